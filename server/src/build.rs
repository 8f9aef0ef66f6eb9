//! Which program this is: what a measurement must name so that another can be compared with it.
//! It must not know what the program does.

use std::sync::OnceLock;

use sha2::{Digest, Sha256};

/// Version, platform, the program file's digest and the instruction sets of this processor that
/// its operations can use. The digest is taken once, at the first call; it reads the whole file.
pub(crate) fn describe() -> &'static str {
    static TEXT: OnceLock<String> = OnceLock::new();
    TEXT.get_or_init(|| {
        let program = std::env::current_exe().and_then(std::fs::read);
        let digest = program.map_or_else(
            |_| "unread".to_owned(),
            |bytes| hex::encode(&Sha256::digest(bytes)[..6]),
        );
        let mut parts = vec![
            env!("CARGO_PKG_VERSION").to_owned(),
            format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS),
            format!("program {digest}"),
        ];
        parts.extend(instruction_sets().into_iter().map(str::to_owned));
        parts.join(" ")
    })
}

#[cfg(target_arch = "x86_64")]
fn instruction_sets() -> Vec<&'static str> {
    use std::arch::is_x86_feature_detected as has;
    let all = [
        (has!("avx2") && has!("fma"), "avx2"),
        (has!("avx512f"), "avx512f"),
        (has!("avx512vnni"), "avx512vnni"),
        (has!("avx512bf16"), "avx512bf16"),
    ];
    all.into_iter()
        .filter_map(|(is_there, name)| is_there.then_some(name))
        .collect()
}

#[cfg(not(target_arch = "x86_64"))]
fn instruction_sets() -> Vec<&'static str> {
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_build_is_named_by_its_program() {
        let text = describe();
        assert!(text.starts_with(env!("CARGO_PKG_VERSION")), "{text}");
        assert!(
            text.contains(" program ") && !text.contains("unread"),
            "{text}"
        );
    }
}

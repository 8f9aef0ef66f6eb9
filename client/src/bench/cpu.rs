//! What this process itself has used of the processor, for a load tester on the server's machine
//! takes from it what it uses.

/// Ticks a second of the times in `/proc`; Linux has fixed it at this for programs.
const TICKS: f64 = 100.0;

/// Processor seconds of this process, user and system; `None` where the system does not say.
pub(crate) fn seconds() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    of_stat(&stat)
}

fn of_stat(stat: &str) -> Option<f64> {
    // The name in parentheses may hold anything; fields are counted after it.
    let fields = stat.rsplit_once(')')?.1;
    let mut fields = fields.split_whitespace().skip(11);
    let user: f64 = fields.next()?.parse().ok()?;
    let system: f64 = fields.next()?.parse().ok()?;
    Some((user + system) / TICKS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_and_system_time_are_added() {
        let stat = "42 (a ) name) S 1 2 3 4 5 6 7 8 9 10 150 50 0 0 20 0 3 0";
        assert_eq!(of_stat(stat), Some(2.0));
        assert_eq!(of_stat("42 (x) S 1"), None);
    }
}

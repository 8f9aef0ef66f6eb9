//! A folder of texts as rows: every `.txt` and `.md` file below it is one document.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{cli::output::Out, error::Error};

/// The folder's documents as JSONL, sorted by path, so that the same folder is the same data on every machine. Files with
/// nothing but white space are left out and named; hidden files, and folders behind links, are not looked at.
pub(crate) fn jsonl(folder: &Path, out: Out) -> Result<Arc<[u8]>, Error> {
    let mut files = Vec::new();
    find(folder, &mut files)?;
    files.sort();
    let (mut rows, mut count) = (String::new(), 0_usize);
    for file in files {
        let bytes = fs::read(&file).map_err(|error| Error::file(&file, &error))?;
        let text = String::from_utf8(bytes).map_err(|error| {
            let at = error.utf8_error().valid_up_to() + 1;
            Error::argument(format!(
                "{} is not UTF-8 from byte {at}: convert it",
                file.display()
            ))
        })?;
        let text = text.trim_start_matches('\u{feff}');
        if text.trim().is_empty() {
            out.remark(format_args!("{} is empty and left out", file.display()));
            continue;
        }
        rows += &serde_json::json!({ "text": text }).to_string();
        rows.push('\n');
        count += 1;
    }
    if count == 0 {
        return Err(Error::argument(format!(
            "{} holds no .txt or .md file with text",
            folder.display()
        )));
    }
    out.remark(format_args!("{count} documents in {}", folder.display()));
    Ok(rows.into_bytes().into())
}

fn find(folder: &Path, files: &mut Vec<PathBuf>) -> Result<(), Error> {
    let broken = |error: std::io::Error| Error::file(folder, &error);
    for entry in fs::read_dir(folder).map_err(broken)? {
        let entry = entry.map_err(broken)?;
        if entry.file_name().to_string_lossy().starts_with('.') {
            continue;
        }
        let path = entry.path();
        let text = path.extension().is_some_and(|ending| {
            ending.eq_ignore_ascii_case("txt") || ending.eq_ignore_ascii_case("md")
        });
        if entry.file_type().map_err(broken)?.is_dir() {
            find(&path, files)?;
        } else if text && path.is_file() {
            files.push(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

    use super::*;

    #[test]
    fn a_folder_is_its_texts_by_path() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let out = Out::new(false, true);
        assert!(jsonl(dir.path(), out).is_err(), "nothing is there");
        write("z.md", "\u{feff}last \"one\"\n");
        write("b/deep/a.TXT", "second\nline");
        write("a.txt", "first");
        write("b/empty.md", " \n");
        write("b/table.csv", "text\nno");
        write(".hidden/a.md", "no");
        let rows = jsonl(dir.path(), out).unwrap();
        let expected = "{\"text\":\"first\"}\n{\"text\":\"second\\nline\"}\n{\"text\":\"last \\\"one\\\"\\n\"}\n";
        assert_eq!(std::str::from_utf8(&rows).unwrap(), expected);
        fs::write(dir.path().join("latin.txt"), b"\xe9").unwrap();
        let error = jsonl(dir.path(), out).unwrap_err();
        assert!(error.message.contains("latin.txt"), "{error}");
    }
}

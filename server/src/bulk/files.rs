//! The files of bulk jobs: one directory a job, with its input as it came and its output as far as it is. The output only
//! grows; a crash may leave bytes behind what its row counts, and opening cuts them off. This file must not know what
//! stands in a line.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::BulkError;

const INPUT: &str = "input.jsonl";
const OUTPUT: &str = "output.jsonl";

/// Where the files lie.
#[derive(Clone)]
pub(super) struct Files {
    root: PathBuf,
}

/// A job's input, read line by line.
pub struct Input {
    lines: BufReader<File>,
    path: PathBuf,
}

/// A job's output, written at its end.
pub struct Output {
    file: File,
    path: PathBuf,
    length: u64,
}

fn failed<'a>(
    action: &'static str,
    path: &'a Path,
) -> impl FnOnce(std::io::Error) -> BulkError + use<'a> {
    move |source| BulkError::File {
        action,
        path: path.to_owned(),
        source,
    }
}

fn sync_directory(path: &Path) -> Result<(), BulkError> {
    File::open(path)
        .and_then(|directory| directory.sync_all())
        .map_err(failed("flush the directory", path))
}

// === impl Files ===

impl Files {
    /// `bulk` under the data directory, made when absent.
    pub(super) fn open(data_dir: &Path) -> Result<Self, BulkError> {
        let root = data_dir.join("bulk");
        fs::create_dir_all(&root).map_err(failed("create", &root))?;
        sync_directory(data_dir)?;
        Ok(Self { root })
    }

    fn directory(&self, uid: &str) -> PathBuf {
        self.root.join(uid)
    }

    /// Stores an input and an empty output; durable when this returns.
    pub(super) fn create(&self, uid: &str, input: &[u8]) -> Result<(), BulkError> {
        let directory = self.directory(uid);
        fs::create_dir(&directory).map_err(failed("create", &directory))?;
        for (name, bytes) in [(INPUT, input), (OUTPUT, b"".as_slice())] {
            let path = directory.join(name);
            let mut file = File::create(&path).map_err(failed("create", &path))?;
            file.write_all(bytes)
                .and_then(|()| file.sync_all())
                .map_err(failed("write", &path))?;
        }
        sync_directory(&directory)?;
        sync_directory(&self.root)
    }

    /// Removes a job's files. Files too many harm nobody, so a failure is logged; the next start tries again.
    pub(super) fn remove(&self, uid: &str) {
        let directory = self.directory(uid);
        if let Err(error) = fs::remove_dir_all(&directory) {
            tracing::warn!(directory = %directory.display(), %error, "a bulk job's files could not be removed");
        }
    }

    /// Removes what no row names: a crash between files and row left it.
    pub(super) fn remove_others(&self, uids: &HashSet<String>) {
        let Ok(entries) = fs::read_dir(&self.root) else {
            return;
        };
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if !uids.contains(&name) {
                self.remove(&name);
            }
        }
    }

    pub(super) fn input(&self, uid: &str, skip: u64) -> Result<Input, BulkError> {
        let path = self.directory(uid).join(INPUT);
        let file = File::open(&path).map_err(failed("open", &path))?;
        let lines = BufReader::with_capacity(1 << 16, file);
        let mut input = Input { lines, path };
        let mut line = Vec::new();
        for _ in 0..skip {
            line.clear();
            input.read(&mut line)?;
        }
        Ok(input)
    }

    pub(super) fn output(&self, uid: &str, length: u64) -> Result<Output, BulkError> {
        let path = self.directory(uid).join(OUTPUT);
        let mut file = OpenOptions::new()
            .write(true)
            .open(&path)
            .map_err(failed("open", &path))?;
        let found = file.metadata().map_err(failed("open", &path))?.len();
        if found < length {
            let what = format!("it has {found} bytes, its row counts {length}");
            return Err(failed("read", &path)(std::io::Error::other(what)));
        }
        file.set_len(length)
            .and_then(|()| file.seek(SeekFrom::Start(length)))
            .map_err(failed("cut", &path))?;
        Ok(Output { file, path, length })
    }

    pub(super) fn read_output(
        &self,
        uid: &str,
        offset: u64,
        most: usize,
    ) -> Result<Vec<u8>, BulkError> {
        let path = self.directory(uid).join(OUTPUT);
        let mut file = File::open(&path).map_err(failed("open", &path))?;
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(offset))
            .and_then(|_| file.take(most as u64).read_to_end(&mut bytes))
            .map_err(failed("read", &path))?;
        Ok(bytes)
    }
}

// === impl Input ===

impl Input {
    /// The next line without its end; `None` after the last one. Reads from the system's cache most of the time.
    ///
    /// # Errors
    /// A file that fails.
    pub fn next_line(&mut self) -> Result<Option<Vec<u8>>, BulkError> {
        let mut line = Vec::new();
        if self.read(&mut line)? == 0 {
            return Ok(None);
        }
        while matches!(line.last(), Some(b'\n' | b'\r')) {
            line.pop();
        }
        Ok(Some(line))
    }

    fn read(&mut self, line: &mut Vec<u8>) -> Result<usize, BulkError> {
        self.lines
            .read_until(b'\n', line)
            .map_err(failed("read", &self.path))
    }
}

// === impl Output ===

impl Output {
    /// Appends whole lines; they are on the disk when this returns. Blocks.
    ///
    /// # Errors
    /// A file that fails: a full disk, for example.
    pub fn append(&mut self, lines: &[u8]) -> Result<(), BulkError> {
        self.file
            .write_all(lines)
            .and_then(|()| self.file.sync_data())
            .map_err(failed("append to", &self.path))?;
        self.length += lines.len() as u64;
        Ok(())
    }

    /// Bytes on the disk.
    pub fn length(&self) -> u64 {
        self.length
    }
}

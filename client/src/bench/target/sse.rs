//! Server-sent events out of the pieces in which a body arrives: the payload of each `data:`
//! line, one line at a time. It knows nothing of what they say.

/// Lines that have not ended yet.
#[derive(Debug, Default)]
pub(crate) struct Lines {
    buffer: Vec<u8>,
    /// Up to here the lines have been given.
    taken: usize,
}

/// A line longer than this is no event of a language model.
const LONGEST: usize = 16 << 20;

// === impl Lines ===

impl Lines {
    /// Adds a piece; an endless line is refused.
    pub(crate) fn push(&mut self, piece: &[u8]) -> Result<(), String> {
        if self.taken > 0 {
            self.buffer.drain(..self.taken);
            self.taken = 0;
        }
        if self.buffer.len() + piece.len() > LONGEST {
            return Err(format!("an event is longer than {LONGEST} bytes"));
        }
        self.buffer.extend_from_slice(piece);
        Ok(())
    }

    /// The next payload that is complete.
    pub(crate) fn next_data(&mut self) -> Option<&[u8]> {
        loop {
            let rest = self.buffer.get(self.taken..)?;
            let length = rest.iter().position(|byte| *byte == b'\n')?;
            let start = self.taken;
            self.taken += length + 1;
            let line = &self.buffer[start..start + length];
            if line.starts_with(b"data:") {
                return Some(self.buffer[start + 5..start + length].trim_ascii());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_the_same_however_the_body_is_cut() {
        let body =
            b": hello\ndata: {\"a\": 1}\r\n\r\nevent: x\ndata:{\"b\": 2}\n\ndata: [DONE]\n\n";
        for size in 1..=body.len() {
            let mut lines = Lines::default();
            let mut found = Vec::new();
            for piece in body.chunks(size) {
                lines.push(piece).unwrap();
                while let Some(data) = lines.next_data() {
                    found.push(String::from_utf8(data.to_vec()).unwrap());
                }
            }
            assert_eq!(
                found,
                ["{\"a\": 1}", "{\"b\": 2}", "[DONE]"],
                "pieces of {size}"
            );
        }
    }

    #[test]
    fn an_endless_line_is_refused() {
        let mut lines = Lines::default();
        let piece = vec![b'x'; 1 << 20];
        let outcome = (0..20).try_for_each(|_| lines.push(&piece));
        assert!(outcome.is_err());
    }
}

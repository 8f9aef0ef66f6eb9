//! The words of requests: texts of a given number of tokens made from common words, or prompts
//! out of a file. It knows how many tokens each word costs, and not whose tokenizer says so.

use std::path::Path;

use serde_json::Value;

use crate::{bench::random::Random, v1};

/// Words that most vocabularies hold as one token with the space before them.
pub(crate) const WORDS: &[&str] = &[
    " the",
    " and",
    " that",
    " with",
    " from",
    " this",
    " have",
    " which",
    " their",
    " other",
    " about",
    " there",
    " when",
    " more",
    " time",
    " people",
    " some",
    " could",
    " them",
    " only",
    " into",
    " then",
    " first",
    " would",
    " like",
    " these",
    " new",
    " between",
    " after",
    " most",
    " two",
    " year",
    " work",
    " state",
    " know",
    " think",
    " where",
    " world",
    " life",
    " over",
    " way",
    " well",
    " day",
    " because",
    " good",
    " each",
    " those",
    " long",
    " own",
    " very",
    " make",
    " still",
    " right",
    " place",
    " old",
    " great",
    " high",
    " small",
    " large",
    " city",
    " water",
    " white",
    " light",
    " house",
    " group",
    " while",
    " point",
    " country",
    " school",
    " problem",
    " hand",
    " part",
    " system",
    " program",
    " question",
    " government",
    " number",
    " night",
    " home",
    " room",
    " mother",
    " area",
    " money",
    " story",
    " fact",
    " month",
    " lot",
    " study",
    " book",
    " eye",
    " job",
    " word",
    " business",
    " issue",
    " side",
    " kind",
    " head",
    " service",
    " friend",
    " father",
    " power",
    " hour",
    " game",
    " line",
    " end",
    " member",
    " law",
    " car",
    " community",
    " name",
    " president",
    " team",
    " minute",
    " idea",
    " body",
    " information",
    " back",
    " parent",
    " face",
    " others",
    " level",
    " office",
    " door",
    " health",
    " person",
    " art",
    " war",
    " history",
    " party",
    " result",
    " change",
    " morning",
    " reason",
    " research",
    " girl",
    " moment",
    " air",
    " teacher",
    " force",
    " education",
];

/// Words with their costs, and what the tokenizer and the chat template add to every text.
#[derive(Clone, Debug)]
pub(crate) struct Words {
    costs: Vec<u32>,
    cheapest: usize,
    /// Tokens around a raw text (BOS).
    pub(crate) around_text: u32,
    /// Tokens around the content of a chat of one message.
    pub(crate) around_chat: u32,
}

// === impl Words ===

impl Words {
    /// One token a word, nothing around: a guess, for servers that cannot be asked.
    pub(crate) fn guessed() -> Self {
        Self::new(vec![1; WORDS.len()], 0, 0)
    }

    /// With the measured cost of each of [`WORDS`].
    pub(crate) fn new(costs: Vec<u32>, around_text: u32, around_chat: u32) -> Self {
        let cheapest = (0..costs.len()).min_by_key(|i| costs[*i]).unwrap_or(0);
        Self {
            costs,
            cheapest,
            around_text,
            around_chat,
        }
    }

    /// Reads the costs off a tokenizer's pieces for all of [`WORDS`] in a row: a token belongs
    /// to the word in which it begins.
    pub(crate) fn costs_of(pieces: &[String]) -> Vec<u32> {
        let mut costs = vec![0; WORDS.len()];
        let (mut word, mut left) = (0, WORDS[0].len());
        for piece in pieces {
            if let Some(cost) = costs.get_mut(word) {
                *cost += 1;
            }
            let mut length = piece.len();
            while length > 0 && word < WORDS.len() {
                let step = length.min(left);
                length -= step;
                left -= step;
                if left == 0 {
                    word += 1;
                    left = WORDS.get(word).map_or(0, |word| word.len());
                }
            }
        }
        for cost in &mut costs {
            *cost = (*cost).max(1);
        }
        costs
    }

    /// Appends words of so many tokens, short of it only where no word is small enough.
    pub(crate) fn append(&self, text: &mut String, tokens: u32, random: &mut Random) {
        let mut left = tokens;
        while left > 0 {
            let drawn = random.index(WORDS.len());
            let word = if self.costs[drawn] <= left {
                drawn
            } else {
                self.cheapest
            };
            if self.costs[word] > left && !text.is_empty() {
                break;
            }
            text.push_str(WORDS[word]);
            left = left.saturating_sub(self.costs[word]);
        }
    }
}

/// One prompt of a file.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct FilePrompt {
    pub(crate) text: String,
    /// A whole conversation, where the file has one.
    pub(crate) messages: Vec<v1::ChatMessage>,
    /// How long the answer is to be, where the file says so.
    pub(crate) output: Option<u32>,
}

/// Reads prompts: one a line, or JSONL with `prompt`, `text` or `messages` and perhaps `max_tokens`.
pub(crate) fn read(path: &Path) -> Result<Vec<FilePrompt>, String> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| format!("--prompts: cannot read {}: {error}", path.display()))?;
    let mut prompts = Vec::new();
    for (number, line) in text.lines().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        let prompt = if line.trim_start().starts_with('{') {
            json_prompt(line)
                .map_err(|e| format!("--prompts {}: line {}: {e}", path.display(), number + 1))?
        } else {
            FilePrompt {
                text: line.to_owned(),
                messages: Vec::new(),
                output: None,
            }
        };
        prompts.push(prompt);
    }
    if prompts.is_empty() {
        return Err(format!(
            "--prompts {}: holds no prompt; write one a line, or JSON objects with `prompt` or `messages`",
            path.display()
        ));
    }
    Ok(prompts)
}

fn json_prompt(line: &str) -> Result<FilePrompt, String> {
    let value: Value = serde_json::from_str(line).map_err(|error| error.to_string())?;
    let mut messages = Vec::new();
    for message in value["messages"].as_array().into_iter().flatten() {
        let role = match message["role"].as_str() {
            Some("system") => v1::Role::System,
            Some("user") => v1::Role::User,
            Some("assistant") => v1::Role::Assistant,
            Some("tool") => v1::Role::Tool,
            other => {
                return Err(format!(
                    "{other:?} is no role; use system, user, assistant or tool"
                ));
            }
        };
        let content = message["content"]
            .as_str()
            .ok_or("a message has no content")?;
        messages.push(v1::ChatMessage {
            role: role.into(),
            content: content.to_owned(),
            ..v1::ChatMessage::default()
        });
    }
    let named = ["prompt", "text", "question"];
    let text = match named.iter().find_map(|name| value[*name].as_str()) {
        Some(text) => text.to_owned(),
        None if messages.is_empty() => return Err("has neither `prompt` nor `messages`".to_owned()),
        None => {
            let contents: Vec<&str> = messages.iter().map(|m| m.content.as_str()).collect();
            contents.join("\n")
        }
    };
    let lengths = ["max_tokens", "output_length"];
    let output = lengths.iter().find_map(|name| value[*name].as_u64());
    Ok(FilePrompt {
        text,
        messages,
        output: output.map(|length| length.clamp(1, 1 << 20) as u32),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::random::Purpose;

    #[test]
    fn texts_have_the_tokens_that_were_asked_for() {
        let costs: Vec<u32> = (0..WORDS.len()).map(|i| 1 + (i % 3) as u32).collect();
        let words = Words::new(costs.clone(), 0, 0);
        for tokens in [1, 2, 17, 512] {
            let mut text = String::new();
            words.append(
                &mut text,
                tokens,
                &mut Random::new(1, Purpose::Request(tokens.into())),
            );
            let cost = |word: &str| {
                let spaced = format!(" {word}");
                costs[WORDS.iter().position(|w| *w == spaced).unwrap()]
            };
            let total: u32 = text.split_whitespace().map(cost).sum();
            assert_eq!(total, tokens);
        }
    }

    #[test]
    fn costs_are_read_off_the_pieces() {
        // The first word in two pieces, the others whole, and the last cut into letters.
        let last = WORDS[WORDS.len() - 1];
        let mut pieces = vec![" t".to_owned(), "he".to_owned()];
        pieces.extend(WORDS[1..WORDS.len() - 1].iter().map(|w| (*w).to_owned()));
        pieces.extend(last.chars().map(String::from));
        let costs = Words::costs_of(&pieces);
        assert_eq!((costs[0], costs[1]), (2, 1));
        assert_eq!(costs[WORDS.len() - 1], last.len() as u32);
    }

    #[test]
    fn files_hold_lines_or_objects() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("prompts");
        let text = "plain words\n\n{\"prompt\": \"p\", \"max_tokens\": 7}\n\
            {\"messages\": [{\"role\": \"user\", \"content\": \"hi\"}]}\n";
        std::fs::write(&path, text).unwrap();
        let prompts = read(&path).unwrap();
        let texts: Vec<_> = prompts.iter().map(|p| p.text.as_str()).collect();
        assert_eq!(texts, ["plain words", "p", "hi"]);
        assert_eq!(prompts[1].output, Some(7));
        assert_eq!(prompts[2].messages.len(), 1);
        std::fs::write(&path, "{\"role\": 1}").unwrap();
        assert!(read(&path).unwrap_err().contains("line 1: has neither"));
    }
}

//! What requests hold: operation, tenant, adapter, words and lengths of the request with a given
//! index, always the same for one seed. It knows neither when a request is sent nor to whom.

use std::{fmt, str::FromStr, sync::Arc};

use crate::{
    bench::{
        distribution::Lengths,
        popularity::{Popularity, Ranking},
        prompt::{FilePrompt, Words},
        random::{Purpose, Random},
        schedule::Due,
        trace,
    },
    v1,
};

/// What is asked of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Operation {
    Generate,
    Chat,
    Classify,
    Embed,
}

impl Operation {
    pub(crate) const ALL: [Self; 4] = [Self::Generate, Self::Chat, Self::Classify, Self::Embed];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Generate => "generate",
            Self::Chat => "chat",
            Self::Classify => "classify",
            Self::Embed => "embed",
        }
    }
}

impl FromStr for Operation {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|one| one.name() == text);
        found.ok_or_else(|| {
            format!("{text:?} is no operation; use generate, chat, classify or embed")
        })
    }
}

/// Operations with their weights.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Mix(Vec<(Operation, f64)>);

// === impl Mix ===

impl Mix {
    pub(crate) fn has(&self, operation: Operation) -> bool {
        self.0.iter().any(|(one, _)| *one == operation)
    }

    fn draw(&self, random: &mut Random) -> Operation {
        let total: f64 = self.0.iter().map(|(_, weight)| weight).sum();
        let mut at = random.unit() * total;
        for (operation, weight) in &self.0 {
            if at < *weight {
                return *operation;
            }
            at -= weight;
        }
        self.0[self.0.len() - 1].0
    }
}

impl FromStr for Mix {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut mix = Vec::new();
        for part in text.split(',') {
            let (name, weight) = part.split_once(':').unwrap_or((part, "1"));
            let operation: Operation = name.trim().parse()?;
            let weight = crate::bench::quantity::positive(weight, 1e6)
                .map_err(|error| format!("the weight of {name}: {error}"))?;
            mix.push((operation, weight));
        }
        Ok(Self(mix))
    }
}

impl fmt::Display for Mix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (operation, weight)) in self.0.iter().enumerate() {
            let comma = if i == 0 { "" } else { "," };
            match self.0.len() {
                1 => f.write_str(operation.name())?,
                _ => write!(f, "{comma}{}:{weight}", operation.name())?,
            }
        }
        Ok(())
    }
}

/// Who asks, and for which adapters.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Tenant {
    /// Empty without tenants.
    pub(crate) name: String,
    /// Most popular first.
    pub(crate) adapters: Vec<String>,
}

/// Where the words come from.
#[derive(Clone, Debug)]
pub(crate) enum Prompts {
    Synthetic {
        words: Words,
        input: Lengths,
        prefix: Option<Prefix>,
    },
    /// In turn.
    File(Arc<Vec<FilePrompt>>),
}

/// Tokens that requests begin with in common.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Prefix {
    pub(crate) tokens: u32,
    /// How many different ones there are.
    pub(crate) count: u32,
}

/// The words of one request.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Input {
    Text(String),
    Messages(Vec<v1::ChatMessage>),
}

/// One request, ready to be sent.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Call {
    pub(crate) index: u64,
    pub(crate) operation: Operation,
    /// Place in the list of tenants.
    pub(crate) tenant: usize,
    /// Place in the tenant's list of adapters; `None` is the base.
    pub(crate) adapter: Option<usize>,
    pub(crate) input: Input,
    /// Tokens to generate.
    pub(crate) output: u32,
}

/// The whole of it.
#[derive(Clone, Debug)]
pub(crate) struct Workload {
    pub(crate) seed: u64,
    pub(crate) mix: Mix,
    pub(crate) prompts: Prompts,
    pub(crate) output: Lengths,
    /// At least one.
    pub(crate) tenants: Vec<Tenant>,
    /// How popular the adapters of each tenant are; `None` where it has none.
    rankings: Vec<Option<Ranking>>,
    pub(crate) base_share: f64,
    pub(crate) trace: Option<Arc<Vec<trace::Row>>>,
}

/// What a workload is made of, but for its adapters' popularity.
#[derive(Clone, Debug)]
pub(crate) struct Ingredients {
    pub(crate) seed: u64,
    pub(crate) mix: Mix,
    pub(crate) prompts: Prompts,
    pub(crate) output: Lengths,
    pub(crate) tenants: Vec<Tenant>,
    pub(crate) base_share: f64,
    pub(crate) trace: Option<Arc<Vec<trace::Row>>>,
}

// === impl Workload ===

impl Workload {
    pub(crate) fn new(parts: Ingredients, popularity: Popularity) -> Self {
        let ranking = |tenant: &Tenant| {
            (!tenant.adapters.is_empty()).then(|| Ranking::new(popularity, tenant.adapters.len()))
        };
        Self {
            rankings: parts.tenants.iter().map(ranking).collect(),
            seed: parts.seed,
            mix: parts.mix,
            prompts: parts.prompts,
            output: parts.output,
            tenants: parts.tenants,
            base_share: parts.base_share,
            trace: parts.trace,
        }
    }

    /// The same kind of requests with other draws, so that a later step finds no cache warmed
    /// by an earlier one.
    pub(crate) fn reseeded(&self, step: u64) -> Self {
        let mut other = self.clone();
        other.seed = self
            .seed
            .wrapping_add(step.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        other
    }

    /// The request of this index.
    pub(crate) fn call(&self, due: &Due) -> Call {
        let mut random = Random::new(self.seed, Purpose::Request(due.index));
        let row = match (&self.trace, due.row) {
            (Some(rows), Some(row)) => rows.get(row),
            _ => None,
        };
        // Drawn in the same order whether or not it is used, so that a change of one option
        // leaves the draws of the others as they were.
        let drawn_operation = self.mix.draw(&mut random);
        let is_base = random.unit() < self.base_share;
        let named = row.and_then(|row| row.tenant.as_deref());
        let known = named.and_then(|name| self.tenants.iter().position(|t| t.name == name));
        let count = self.tenants.len() as u64;
        let tenant = known.or(due.tenant).unwrap_or((due.index % count) as usize);
        let turn = if due.tenant.is_some() {
            due.index
        } else {
            due.index / count
        };
        let mut choice = Random::new(self.seed, Purpose::Adapter(due.index));
        let ranking = self.rankings[tenant].as_ref();
        let drawn = ranking.map(|ranking| ranking.draw(turn, &mut choice));
        let named = row.and_then(|row| row.adapter.as_deref());
        let adapter = match named {
            Some(name) => self.tenants[tenant].adapters.iter().position(|a| a == name),
            None => drawn.filter(|_| !is_base),
        };
        let operation = row.and_then(|row| row.operation).unwrap_or(drawn_operation);
        let output = self.output.draw(&mut random);
        let (input, own) = self.input(due.index, operation, row, &mut random);
        Call {
            index: due.index,
            operation,
            tenant,
            adapter,
            input,
            output: row.and_then(|row| row.output).or(own).unwrap_or(output),
        }
    }

    /// The words, and the output length that comes with them.
    fn input(
        &self,
        index: u64,
        operation: Operation,
        row: Option<&trace::Row>,
        random: &mut Random,
    ) -> (Input, Option<u32>) {
        if let Some(prompt) = row.and_then(|row| row.prompt.clone()) {
            return (Input::Text(prompt), None);
        }
        match &self.prompts {
            Prompts::File(prompts) => {
                let prompt = &prompts[(index % prompts.len() as u64) as usize];
                let input = if operation == Operation::Chat && !prompt.messages.is_empty() {
                    Input::Messages(prompt.messages.clone())
                } else {
                    Input::Text(prompt.text.clone())
                };
                (input, prompt.output)
            }
            Prompts::Synthetic {
                words,
                input,
                prefix,
            } => {
                let drawn = input.draw(random);
                let length = row.and_then(|row| row.input).unwrap_or(drawn);
                let around = match operation {
                    Operation::Chat => words.around_chat,
                    _ => words.around_text,
                };
                let own = length.saturating_sub(around).max(1);
                let mut text = String::with_capacity(own as usize * 7);
                if let Some(prefix) = prefix {
                    let number = random.index(prefix.count as usize) as u32;
                    let mut shared = Random::new(self.seed, Purpose::Prefix(number));
                    words.append(&mut text, prefix.tokens, &mut shared);
                }
                words.append(&mut text, own, random);
                (Input::Text(text), None)
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn ingredients() -> Ingredients {
        Ingredients {
            seed: 1,
            mix: "generate".parse().unwrap(),
            prompts: Prompts::Synthetic {
                words: Words::guessed(),
                input: Lengths::Fixed(16),
                prefix: None,
            },
            output: Lengths::Fixed(4),
            tenants: vec![Tenant::default()],
            base_share: 0.0,
            trace: None,
        }
    }

    pub(crate) fn due(index: u64) -> Due {
        Due {
            index,
            at: std::time::Duration::ZERO,
            warmup: false,
            tenant: None,
            row: None,
        }
    }

    fn calls(parts: Ingredients, popularity: Popularity) -> Vec<Call> {
        let workload = Workload::new(parts, popularity);
        (0..4000).map(|index| workload.call(&due(index))).collect()
    }

    #[test]
    fn an_index_and_a_seed_fix_a_request() {
        let parts = || Ingredients {
            mix: "generate:3,classify:1".parse().unwrap(),
            tenants: vec![Tenant {
                name: "acme".to_owned(),
                adapters: vec!["a".to_owned(), "b".to_owned()],
            }],
            ..ingredients()
        };
        let first = calls(parts(), Popularity::Uniform);
        assert_eq!(first, calls(parts(), Popularity::Uniform));
        let other = Ingredients { seed: 2, ..parts() };
        assert_ne!(first, calls(other, Popularity::Uniform));
        let classify = first
            .iter()
            .filter(|c| c.operation == Operation::Classify)
            .count();
        assert!((900..1100).contains(&classify), "{classify}");
        // The popularity must not change the words.
        let hot = calls(parts(), Popularity::Hot(1.0));
        assert!(hot.iter().all(|call| call.adapter == Some(0)));
        assert!(first.iter().zip(&hot).all(|(a, b)| a.input == b.input));
    }

    #[test]
    fn base_share_and_tenants_in_turn() {
        let tenant = |name: &str| Tenant {
            name: name.to_owned(),
            adapters: (0..3).map(|i| format!("{name}{i}")).collect(),
        };
        let parts = Ingredients {
            tenants: vec![tenant("x"), tenant("y")],
            base_share: 0.25,
            ..ingredients()
        };
        let all = calls(parts.clone(), Popularity::RoundRobin);
        let base = all.iter().filter(|call| call.adapter.is_none()).count();
        assert!((900..1100).contains(&base), "{base}");
        let turn: Vec<usize> = all[..4].iter().map(|call| call.tenant).collect();
        assert_eq!(turn, [0, 1, 0, 1]);
        let parts = Ingredients {
            base_share: 0.0,
            ..parts
        };
        let all = calls(parts, Popularity::RoundRobin);
        let places: Vec<_> = all[..8].iter().filter_map(|call| call.adapter).collect();
        assert_eq!(
            places,
            [0, 0, 1, 1, 2, 2, 0, 0],
            "each tenant goes through its own"
        );
    }

    #[test]
    fn prefixes_are_shared_and_the_rest_is_not() {
        let prompts = Prompts::Synthetic {
            words: Words::guessed(),
            input: Lengths::Fixed(8),
            prefix: Some(Prefix {
                tokens: 32,
                count: 2,
            }),
        };
        let all = calls(
            Ingredients {
                prompts,
                ..ingredients()
            },
            Popularity::Uniform,
        );
        let head = |call: &Call| match &call.input {
            Input::Text(text) => {
                let words: Vec<&str> = text.split_whitespace().collect();
                assert_eq!(words.len(), 40);
                words[..32].join(" ")
            }
            Input::Messages(_) => String::new(),
        };
        let heads: std::collections::BTreeSet<String> = all.iter().map(head).collect();
        assert_eq!(heads.len(), 2);
        let whole: std::collections::BTreeSet<String> =
            all.iter().map(|call| format!("{:?}", call.input)).collect();
        assert!(whole.len() > 3900);
    }

    #[test]
    fn a_trace_decides_what_it_records() {
        let row = trace::Row {
            output: Some(9),
            input: Some(3),
            operation: Some(Operation::Embed),
            ..trace::Row::default()
        };
        let parts = Ingredients {
            trace: Some(Arc::new(vec![row])),
            ..ingredients()
        };
        let workload = Workload::new(parts, Popularity::Uniform);
        let call = workload.call(&Due {
            row: Some(0),
            ..due(0)
        });
        assert_eq!((call.operation, call.output), (Operation::Embed, 9));
        let Input::Text(text) = call.input else {
            panic!("text")
        };
        assert_eq!(text.split_whitespace().count(), 3);
    }

    #[test]
    fn mixes_are_refused_with_a_next_step() {
        assert!("dream".parse::<Mix>().unwrap_err().contains("classify"));
        assert!("generate:0".parse::<Mix>().unwrap_err().contains("above 0"));
        assert_eq!("chat".parse::<Mix>().unwrap().to_string(), "chat");
    }
}

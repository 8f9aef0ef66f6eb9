//! `espalier data`: datasets in, a list, away; and what `train` needs to know of a file.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};

use crate::{
    cli::{
        PAGE, Session,
        adapters::deleted,
        all_pages, documents,
        output::{Failure, Out, age, bytes},
    },
    error::Error,
    names::short,
    transfer::DatasetUpload,
    v1::{self, DataFormat},
};

/// Problems shown of a report; JSON has them all.
const SHOWN: usize = 20;

/// Push, list and delete datasets.
#[derive(Debug, Subcommand)]
pub(crate) enum Data {
    /// Upload a file of examples; bad lines are refused with number, field and reason.
    Push(Box<Push>),
    /// A tenant's datasets.
    #[command(visible_alias = "ls")]
    List(List),
    /// One dataset with all its fields, as JSON.
    Get(Name),
    /// Delete a dataset.
    #[command(visible_alias = "rm")]
    Delete(Name),
}

/// A dataset.
#[derive(Debug, Args)]
pub(crate) struct Name {
    /// Its name.
    dataset: String,
}

/// A tenant's datasets.
#[derive(Debug, Args)]
pub(crate) struct List {}

/// How a file of examples is read.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Data")]
pub(crate) struct FileArgs {
    /// jsonl, csv, tsv or text; left out: by the file's name.
    #[arg(long, value_parser = format_named)]
    pub(crate) format: Option<DataFormat>,
    /// Column of the text to classify, or to learn [usual: text].
    #[arg(long, default_value = "", hide_default_value = true)]
    text_col: String,
    /// Column of its label [usual: label].
    #[arg(long, default_value = "", hide_default_value = true)]
    label_col: String,
    /// Column of every label that applies: a list, or in tables names between bars [usual: labels].
    #[arg(long, default_value = "", hide_default_value = true)]
    labels_col: String,
    /// Column of the number to answer with [usual: score].
    #[arg(long, default_value = "", hide_default_value = true)]
    score_col: String,
    /// Column of the prompt [usual: prompt].
    #[arg(long, default_value = "", hide_default_value = true)]
    prompt_col: String,
    /// Column of the completion [usual: completion].
    #[arg(long, default_value = "", hide_default_value = true)]
    completion_col: String,
    /// Column of the messages [usual: messages].
    #[arg(long, default_value = "", hide_default_value = true)]
    messages_col: String,
    /// Column of the instruction [usual: instruction].
    #[arg(long, default_value = "", hide_default_value = true)]
    instruction_col: String,
    /// Column of its input [usual: input].
    #[arg(long, default_value = "", hide_default_value = true)]
    input_col: String,
    /// Column of its output [usual: output].
    #[arg(long, default_value = "", hide_default_value = true)]
    output_col: String,
}

impl FileArgs {
    pub(crate) fn columns(&self) -> v1::ColumnNames {
        v1::ColumnNames {
            text: self.text_col.clone(),
            label: self.label_col.clone(),
            prompt: self.prompt_col.clone(),
            completion: self.completion_col.clone(),
            messages: self.messages_col.clone(),
            instruction: self.instruction_col.clone(),
            input: self.input_col.clone(),
            output: self.output_col.clone(),
            labels: self.labels_col.clone(),
            score: self.score_col.clone(),
        }
    }

    pub(crate) fn format_of(&self, path: &Path) -> Result<DataFormat, Failure> {
        let named = || {
            let extension = path.extension()?.to_str()?;
            format_named(extension).ok()
        };
        self.format.or_else(named).ok_or_else(|| {
            let text = format!(
                "{}: none of .jsonl, .csv, .tsv, .txt and .md: pass --format",
                path.display()
            );
            Failure::Usage(text)
        })
    }
}

fn format_named(name: &str) -> Result<DataFormat, String> {
    match name.to_lowercase().as_str() {
        "jsonl" | "ndjson" => Ok(DataFormat::Jsonl),
        "csv" => Ok(DataFormat::Csv),
        "tsv" | "tab" => Ok(DataFormat::Tsv),
        "text" | "txt" | "md" => Ok(DataFormat::Text),
        _ => Err(format!("{name:?} is none of jsonl, csv, tsv, text")),
    }
}

impl Data {
    pub(crate) async fn run(self, session: &Session) -> Result<(), Failure> {
        let Session { client, out } = session;
        match self {
            Self::Push(command) => command.run(session).await,
            Self::List(_) => list(session).await,
            Self::Get(Name { dataset }) => {
                let name = client.names().dataset(&dataset)?;
                out.document(&client.get_dataset(&name).await?)
            }
            Self::Delete(Name { dataset }) => {
                let name = client.names().dataset(&dataset)?;
                client.delete_dataset(&name).await?;
                deleted(*out, &name)
            }
        }
    }
}

/// Upload a file of examples.
#[derive(Debug, Args)]
pub(crate) struct Push {
    /// JSONL, CSV, TSV or text; or a folder, of which every .txt and .md file becomes a document.
    file: PathBuf,
    /// The dataset's name; left out: the file's.
    #[arg(long, short)]
    name: Option<String>,
    #[command(flatten)]
    columns: FileArgs,
    /// Let the server check everything and store nothing.
    #[arg(long)]
    dry_run: bool,
}

impl Push {
    async fn run(self, Session { client, out }: &Session) -> Result<(), Failure> {
        let dataset_id = match self.name {
            Some(name) => name,
            None => id_of(&self.file)?,
        };
        let (format, columns, content) = match self.file.is_dir() {
            true => {
                let content = documents::jsonl(&self.file, *out)?;
                (DataFormat::Jsonl, None, Some(content))
            }
            false => {
                let format = self.columns.format_of(&self.file)?;
                (format, Some(self.columns.columns()), None)
            }
        };
        let upload = DatasetUpload {
            parent: client.names().parent()?,
            dataset_id,
            format,
            columns,
            file: self.file,
            content,
            validate_only: self.dry_run,
            request_id: String::new(),
        };
        let reply = client.upload_dataset(upload).await?;
        let bad = reply
            .report
            .as_ref()
            .map_or(0, |report| report.problem_count);
        if out.is_json() {
            out.document(&reply)?;
        } else {
            print_report(*out, reply.report.as_ref())?;
            if let Some(dataset) = &reply.dataset {
                let name = if dataset.name.is_empty() {
                    "would be accepted"
                } else {
                    &dataset.name
                };
                let (rows, kind) = (dataset.rows, kind_name(dataset.kind()));
                out.line(format_args!(
                    "{name}: {rows} rows of {kind}, {}",
                    bytes(dataset.size_bytes)
                ))?;
            }
        }
        if bad == 0 {
            Ok(())
        } else {
            Err(Failure::Refused)
        }
    }
}

/// The file's name without ending, as an id.
pub(crate) fn id_of(path: &Path) -> Result<String, Failure> {
    let stem = path
        .file_stem()
        .map(|stem| stem.to_string_lossy().to_lowercase());
    let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
    let id: String = stem
        .unwrap_or_default()
        .chars()
        .map(plain)
        .take(63)
        .collect();
    match id.trim_matches('-') {
        "" => Err(Failure::Usage(format!(
            "{}: no name can be made of this: pass --name",
            path.display()
        ))),
        id => Ok(id.to_owned()),
    }
}

pub(crate) fn kind_name(kind: v1::RowKind) -> &'static str {
    match kind {
        v1::RowKind::Completion => "prompt and completion",
        v1::RowKind::Chat => "chat",
        v1::RowKind::Class => "text and label",
        v1::RowKind::Labels => "text and labels",
        v1::RowKind::Score => "text and score",
        v1::RowKind::Text => "raw text",
        v1::RowKind::Instruction => "instruction and output",
        v1::RowKind::Unspecified => "an unknown kind",
    }
}

/// The first bad lines and how many more there are, then warnings as a remark.
pub(crate) fn print_report(out: Out, report: Option<&v1::DataReport>) -> Result<(), Failure> {
    let Some(report) = report else {
        return Ok(());
    };
    for problem in report.problems.iter().take(SHOWN) {
        out.line(problem_text(problem))?;
    }
    let more = report.problem_count.saturating_sub(SHOWN as u64);
    if more > 0 {
        out.line(format_args!("and {more} more bad lines"))?;
    }
    for warning in report.warnings.iter().take(SHOWN) {
        out.remark(format_args!("warning: {}", problem_text(warning)));
    }
    let more = report.warning_count.saturating_sub(SHOWN as u64);
    if more > 0 {
        out.remark(format_args!("and {more} more warnings"));
    }
    Ok(())
}

fn problem_text(problem: &v1::DataProblem) -> String {
    let field = if problem.field.is_empty() {
        String::new()
    } else {
        format!(", {}", problem.field)
    };
    format!("line {}{field}: {}", problem.line, problem.reason)
}

async fn list(Session { client, out }: &Session) -> Result<(), Failure> {
    let parent = client.names().parent()?;
    let datasets = all_pages(|page_token| async {
        let parent = parent.clone();
        let request = v1::ListDatasetsRequest {
            parent,
            page_size: PAGE,
            page_token,
        };
        let page = client.list_datasets(request).await?;
        Ok((page.datasets, page.next_page_token))
    })
    .await?;
    if out.is_json() {
        return out.documents(&datasets);
    }
    let row = |dataset: &v1::Dataset| {
        vec![
            short(&dataset.name).to_owned(),
            dataset.rows.to_string(),
            kind_name(dataset.kind()).to_owned(),
            bytes(dataset.size_bytes),
            dataset.sha256.chars().take(12).collect(),
            age(dataset.create_time.as_ref()),
        ]
    };
    let rows: Vec<_> = datasets.iter().map(row).collect();
    let head = ["DATASET", "ROWS", "KIND", "SIZE", "SHA-256", "UPLOADED"];
    out.table(
        &head,
        &rows,
        "no datasets yet; `espalier data push FILE` uploads one",
    )
}

/// What a file's first row holds: labels, or texts to learn. A text beside columns that are not known is no kind: it may be raw
/// text, and as well a text whose label goes by another name.
pub(crate) fn guess_kind(
    text: &str,
    format: DataFormat,
    columns: &v1::ColumnNames,
) -> Result<v1::RowKind, Error> {
    let or = |given: &str, usual: &str| {
        if given.is_empty() {
            usual.to_owned()
        } else {
            given.to_owned()
        }
    };
    let first = text
        .lines()
        .find(|line| !line.trim().is_empty())
        .unwrap_or_default();
    let first = first.trim_start_matches('\u{feff}');
    let found: Vec<String> = match format {
        DataFormat::Jsonl => match serde_json::from_str::<serde_json::Value>(first) {
            Ok(serde_json::Value::Object(row)) => row.keys().cloned().collect(),
            _ => return Err(Error::argument("the first line is no JSON object")),
        },
        DataFormat::Text => return Ok(v1::RowKind::Text),
        DataFormat::Csv => header(first, ','),
        _ => header(first, '\t'),
    };
    let has = |name: String| found.contains(&name);
    let text = or(&columns.text, "text");
    if has(or(&columns.messages, "messages")) {
        Ok(v1::RowKind::Chat)
    } else if has(or(&columns.prompt, "prompt")) && has(or(&columns.completion, "completion")) {
        Ok(v1::RowKind::Completion)
    } else if has(text.clone()) && has(or(&columns.label, "label")) {
        Ok(v1::RowKind::Class)
    } else if has(text.clone()) && has(or(&columns.labels, "labels")) {
        Ok(v1::RowKind::Labels)
    } else if has(text.clone()) && has(or(&columns.score, "score")) {
        Ok(v1::RowKind::Score)
    } else if found == [text] {
        Ok(v1::RowKind::Text)
    } else if has(or(&columns.instruction, "instruction")) {
        Ok(v1::RowKind::Instruction)
    } else {
        Err(Error::argument(format!(
            "the columns {found:?} are neither text and label (or labels, or score), text alone, prompt and completion, instruction and output, \
             nor messages: name them with --text-col and --label-col (--labels-col, --score-col), --prompt-col and --completion-col, \
             --instruction-col and --output-col, or --messages-col; rows of raw text with other fields need --method text"
        )))
    }
}

fn header(line: &str, separator: char) -> Vec<String> {
    let cell = |cell: &str| cell.trim().trim_matches('"').to_owned();
    line.split(separator).map(cell).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

    use super::*;

    #[test]
    fn kinds_are_guessed_from_the_first_row() {
        let none = v1::ColumnNames::default();
        let named = v1::ColumnNames {
            text: "query".to_owned(),
            label: "intent".to_owned(),
            ..Default::default()
        };
        let cases = [
            (
                "text,label\na,b",
                DataFormat::Csv,
                &none,
                v1::RowKind::Class,
            ),
            (
                r#"{"text": "a", "labels": ["b"]}"#,
                DataFormat::Jsonl,
                &none,
                v1::RowKind::Labels,
            ),
            (
                "text,score\na,2",
                DataFormat::Csv,
                &none,
                v1::RowKind::Score,
            ),
            (
                "\u{feff}\"query\"\t\"intent\"",
                DataFormat::Tsv,
                &named,
                v1::RowKind::Class,
            ),
            (
                r#"{"prompt": "a", "completion": "b"}"#,
                DataFormat::Jsonl,
                &none,
                v1::RowKind::Completion,
            ),
            (
                "\n{\"messages\": []}",
                DataFormat::Jsonl,
                &none,
                v1::RowKind::Chat,
            ),
            (
                "{\"text\": \"a\"}",
                DataFormat::Jsonl,
                &none,
                v1::RowKind::Text,
            ),
            ("text\na", DataFormat::Csv, &none, v1::RowKind::Text),
            ("anything", DataFormat::Text, &none, v1::RowKind::Text),
            (
                "instruction\toutput",
                DataFormat::Tsv,
                &none,
                v1::RowKind::Instruction,
            ),
        ];
        for (text, format, columns, kind) in cases {
            assert_eq!(guess_kind(text, format, columns).unwrap(), kind, "{text}");
        }
        let error = guess_kind("a,b", DataFormat::Csv, &none).unwrap_err();
        assert!(error.message.contains("--text-col"), "{error}");
        assert!(guess_kind("nonsense", DataFormat::Jsonl, &none).is_err());
        let unsure = guess_kind("text,category", DataFormat::Csv, &none).unwrap_err();
        assert!(unsure.message.contains("--method text"), "{unsure}");
    }

    #[test]
    fn ids_are_made_of_file_names() {
        assert_eq!(
            id_of(Path::new("a/Acme_Tickets.v2.csv")).unwrap(),
            "acme-tickets-v2"
        );
        assert!(id_of(Path::new("___.csv")).is_err());
    }
}

//! Recorded traffic: moments, lengths and targets of requests that somebody once sent, read from
//! JSONL or CSV under the names that published traces use. It knows nothing of how it is replayed.

use std::{path::Path, time::Duration};

use serde_json::Value;

use crate::bench::workload::Operation;

/// More rows than this would fill the memory before the test begins.
const MAX_ROWS: usize = 10_000_000;

/// One recorded request; what is not recorded is drawn as for any other request.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Row {
    /// Since the first request of the trace.
    pub(crate) at: Duration,
    pub(crate) input: Option<u32>,
    pub(crate) output: Option<u32>,
    pub(crate) adapter: Option<String>,
    pub(crate) tenant: Option<String>,
    pub(crate) operation: Option<Operation>,
    pub(crate) prompt: Option<String>,
}

/// What a column says. Names are compared by their letters and digits alone.
fn field_of(name: &str) -> Option<Field> {
    let letters: String = name.chars().filter(char::is_ascii_alphanumeric).collect();
    Some(match letters.to_ascii_lowercase().as_str() {
        "timestamp" | "time" | "arrivaltime" | "arrivedat" | "ts" => Field::Time,
        "timestampms" | "timems" | "arrivaltimems" => Field::Milliseconds,
        "inputlength" | "inputtokens" | "contexttokens" | "requesttokens" | "promptlen"
        | "prompttokens" | "inputlen" => Field::Input,
        "outputlength" | "outputtokens" | "generatedtokens" | "responsetokens" | "outputlen"
        | "maxtokens" | "completiontokens" => Field::Output,
        "adapter" | "lora" | "model" => Field::Adapter,
        "tenant" => Field::Tenant,
        "operation" | "op" => Field::Operation,
        "prompt" | "text" => Field::Prompt,
        _ => return None,
    })
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Field {
    Time,
    Milliseconds,
    Input,
    Output,
    Adapter,
    Tenant,
    Operation,
    Prompt,
}

/// Reads a trace. Bare numbers of time are taken in `unit`; `speed` 2 replays it in half the time.
pub(crate) fn read(path: &Path, unit: Duration, speed: f64) -> Result<Vec<Row>, String> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| format!("--trace: cannot read {}: {error}", path.display()))?;
    let is_json = text.trim_start().starts_with('{');
    let rows = if is_json {
        json_rows(&text, unit)
    } else {
        csv_rows(&text, unit)
    };
    let mut rows = rows.map_err(|error| format!("--trace {}: {error}", path.display()))?;
    rows.sort_by(|a, b| a.0.total_cmp(&b.0));
    let first = rows.first().map_or(0.0, |row| row.0);
    let relative = |(at, mut row): (f64, Row)| {
        row.at = Duration::from_secs_f64((at - first) / speed);
        row
    };
    Ok(rows.into_iter().map(relative).collect())
}

/// A row and its moment, in seconds since whatever the trace counts from.
type Timed = (f64, Row);

fn json_rows(text: &str, unit: Duration) -> Result<Vec<Timed>, String> {
    let mut rows = Vec::new();
    for (number, line) in text.lines().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        let wrong = |error: String| format!("line {}: {error}", number + 1);
        let value: Value = serde_json::from_str(line).map_err(|error| wrong(error.to_string()))?;
        let Value::Object(fields) = value else {
            return Err(wrong("is no JSON object".to_owned()));
        };
        let cells = fields.iter().map(|(name, value)| {
            let text = match value {
                Value::String(text) => text.clone(),
                Value::Null => String::new(),
                other => other.to_string(),
            };
            (name.as_str(), text)
        });
        rows.push(row(cells, unit).map_err(wrong)?);
        bounded(rows.len())?;
    }
    some(rows)
}

fn csv_rows(text: &str, unit: Duration) -> Result<Vec<Timed>, String> {
    let mut reader = csv::Reader::from_reader(text.as_bytes());
    let head = reader.headers().map_err(|error| error.to_string())?.clone();
    let mut rows = Vec::new();
    for (number, record) in reader.records().enumerate() {
        let record = record.map_err(|error| error.to_string())?;
        let cells = head.iter().zip(record.iter().map(str::to_owned));
        rows.push(row(cells, unit).map_err(|error| format!("line {}: {error}", number + 2))?);
        bounded(rows.len())?;
    }
    some(rows)
}

fn bounded(rows: usize) -> Result<(), String> {
    if rows > MAX_ROWS {
        return Err(format!("has over {MAX_ROWS} requests; replay a part of it"));
    }
    Ok(())
}

fn some(rows: Vec<Timed>) -> Result<Vec<Timed>, String> {
    if rows.is_empty() {
        return Err("holds no request; it needs one JSON object or CSV row for each".to_owned());
    }
    Ok(rows)
}

fn row<'a>(
    cells: impl Iterator<Item = (&'a str, String)>,
    unit: Duration,
) -> Result<Timed, String> {
    let mut row = Row::default();
    let mut at = None;
    for (name, text) in cells {
        let Some(field) = field_of(name).filter(|_| !text.is_empty()) else {
            continue;
        };
        let length = || match text.parse::<f64>() {
            // A recorded length of zero still was a request.
            Ok(value) if (0.0..=1e6).contains(&value) => Ok(Some((value as u32).max(1))),
            _ => Err(format!(
                "{name}: {text:?} is no number of tokens up to 1000000"
            )),
        };
        match field {
            Field::Time => at = Some(moment(&text, unit).ok_or_else(|| no_time(name, &text))?),
            Field::Milliseconds => {
                let ms = Duration::from_millis(1);
                at = Some(moment(&text, ms).ok_or_else(|| no_time(name, &text))?);
            }
            Field::Input => row.input = length()?,
            Field::Output => row.output = length()?,
            Field::Adapter => row.adapter = Some(text),
            Field::Tenant => row.tenant = Some(text),
            Field::Operation => row.operation = Some(text.parse()?),
            Field::Prompt => row.prompt = Some(text),
        }
    }
    match at {
        Some(at) => Ok((at, row)),
        None => Err("has no timestamp; name the column timestamp, time or arrival_time".to_owned()),
    }
}

fn no_time(name: &str, text: &str) -> String {
    format!("{name}: {text:?} is neither a number nor YYYY-MM-DD HH:MM:SS")
}

/// A number of units, or a date with a time of day.
fn moment(text: &str, unit: Duration) -> Option<f64> {
    if let Ok(value) = text.parse::<f64>() {
        return value.is_finite().then_some(value * unit.as_secs_f64());
    }
    let text = text.trim_end_matches('Z');
    let (date, time) = text.split_once([' ', 'T'])?;
    let mut date = date.splitn(3, '-').map(|part| part.parse::<i64>().ok());
    let (year, month, day) = (date.next()??, date.next()??, date.next()??);
    let mut time = time.splitn(3, ':').map(|part| part.parse::<f64>().ok());
    let (hour, minute, second) = (time.next()??, time.next()??, time.next()??);
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    // Days since an arbitrary origin, with the year beginning in March.
    let (year, month) = if month <= 2 {
        (year - 1, month + 9)
    } else {
        (year, month - 3)
    };
    let days = 365 * year + year.div_euclid(4) - year.div_euclid(100)
        + year.div_euclid(400)
        + (153 * month + 2) / 5
        + day;
    Some(days as f64 * 86_400.0 + hour * 3600.0 + minute * 60.0 + second)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trace(text: &str, unit: Duration, speed: f64) -> Result<Vec<Row>, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trace");
        std::fs::write(&path, text).unwrap();
        read(&path, unit, speed)
    }

    #[test]
    fn json_lines_of_a_published_trace() {
        let text = "{\"timestamp\": 27482, \"input_length\": 6955, \"output_length\": 52, \"hash_ids\": [46, 47]}\n\
                    {\"timestamp\": 30535, \"input_length\": 6472, \"output_length\": 26, \"hash_ids\": []}\n";
        let rows = trace(text, Duration::from_millis(1), 1.0).unwrap();
        assert_eq!(rows[0].at, Duration::ZERO);
        assert_eq!(rows[1].at, Duration::from_millis(3053));
        assert_eq!((rows[1].input, rows[1].output), (Some(6472), Some(26)));
    }

    #[test]
    fn csv_with_dates_out_of_order_and_faster() {
        let text = "TIMESTAMP,ContextTokens,GeneratedTokens,adapter\n\
                    2024-03-01 00:00:01.5000000,10,0,b\n\
                    2024-02-29 23:59:59.5000000,20,7,\"a, with a comma\"\n";
        let rows = trace(text, Duration::from_secs(1), 2.0).unwrap();
        assert_eq!(rows[0].adapter.as_deref(), Some("a, with a comma"));
        assert_eq!((rows[0].input, rows[0].output), (Some(20), Some(7)));
        assert_eq!(
            rows[1].at,
            Duration::from_secs(1),
            "a leap day, at twice the speed"
        );
        assert_eq!(rows[1].output, Some(1));
    }

    #[test]
    fn refusals_name_the_line_and_the_field() {
        let check = |text: &str, expected: &str| {
            let error = trace(text, Duration::from_secs(1), 1.0).unwrap_err();
            assert!(error.contains(expected), "{error}");
        };
        check(
            "{\"timestamp\": 0}\n{\"input_length\": 3}",
            "line 2: has no timestamp",
        );
        check("timestamp,input_length\n0,many", "line 2: input_length");
        check("timestamp\nyesterday", "neither a number");
        check("timestamp,op\n0,dream", "dream");
        check("timestamp\n", "no request");
    }
}

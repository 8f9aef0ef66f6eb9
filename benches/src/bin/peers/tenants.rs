//! Our side over gRPC: a server with one tenant an adapter, each with its own key and connection, one unary request each
//! at the same moment, as the peers are asked.

use std::path::PathBuf;
use std::time::Instant;

use espalier_benches::Fallible;
use espalier_benches::daemon::{Daemon, Tenant};
use espalier_benches::in_process::prompts;
use espalier_benches::turns::median;
use espalier_client::v1;
use serde_json::json;

use super::{NEW, PROMPT, REPEATS};

#[tokio::main(flavor = "current_thread")]
pub(crate) async fn run(model: &str, dtype: Option<&str>, adapters: &[PathBuf]) -> Fallible<()> {
    let flags: Vec<String> = dtype
        .iter()
        .flat_map(|dtype| ["--dtype".to_owned(), (*dtype).to_owned()])
        .collect();
    let daemon = Daemon::spawn(model, &flags)?;
    let mut tenants = Vec::new();
    for (i, adapter) in adapters.iter().enumerate() {
        tenants.push(daemon.tenant(&format!("tenant-{i}"), Some(adapter)).await?);
    }
    let mut rates = Vec::new();
    for repeat in 0..=REPEATS {
        let begin = Instant::now();
        ask_all(&tenants, repeat as u64).await?;
        rates.push((tenants.len() * NEW) as f64 / begin.elapsed().as_secs_f64());
    }
    println!(
        "{}",
        json!({
            "peer": "espalier", "dtype": dtype, "tenants": tenants.len(), "adapters": tenants.len(),
            // The first round has loaded the adapters.
            "e2e_out_tok_s": median(&rates[1..]),
        })
    );
    Ok(())
}

/// Every tenant's request at once; prompts are drawn anew each time, so that no cache has seen them.
async fn ask_all(tenants: &[Tenant], seed: u64) -> Fallible<()> {
    let mut running = Vec::new();
    for (tenant, prompt) in tenants.iter().zip(prompts(tenants.len(), PROMPT, seed)) {
        let (client, request) = (tenant.client.clone(), tenant.request(&prompt, NEW)?);
        running.push(tokio::spawn(async move { client.generate(request).await }));
    }
    for (tenant, reply) in tenants.iter().zip(running) {
        check(&reply.await??, tenant)?;
    }
    Ok(())
}

/// Whole, and from the tenant's own adapter.
fn check(reply: &v1::GenerateResponse, tenant: &Tenant) -> Fallible<()> {
    let tokens = reply.usage.map_or(0, |usage| usage.output_tokens);
    if tokens as usize != NEW {
        return Err(format!("{tokens} tokens instead of {NEW}").into());
    }
    let effective = format!("{:?}", reply.effective);
    match &tenant.adapter {
        Some(adapter) if !effective.contains(adapter.as_str()) => {
            Err(format!("{adapter} was asked for, answered has {effective}").into())
        }
        _ => Ok(()),
    }
}

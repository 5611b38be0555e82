//! `promptweave ensemble create | watch | cancel | result`: jobs from the shell.

use std::time::{Duration, Instant};

use clap::Subcommand;
use reqwest::Method;
use serde::Deserialize;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::client::progress::Phases;
use crate::client::server::{Server, ServerError, ServerOptions};
use crate::client::table::{plain, print, table};
use promptweave_domain::job::JobState;
use promptweave_domain::json;
use promptweave_domain::json::Mistake;
use promptweave_domain::objective::Objective;
use promptweave_domain::reference::{Reference, ResourceName};
use promptweave_domain::split::Split;

/// How long to keep asking a server that is being restarted.
const PATIENCE: Duration = Duration::from_secs(60);
const AGAIN: Duration = Duration::from_secs(1);

#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Learn how much of each source helps a target, and compose the prompt. Prints the ensemble's id.
    Create(Box<CreateArgs>),
    /// Show an ensemble's progress until it is over, then its weights.
    Watch(IdArgs),
    /// Stop an ensemble.
    Cancel(IdArgs),
    /// Print the weights of an ensemble that succeeded.
    Result(ResultArgs),
}

#[derive(Clone, Debug, clap::Args)]
pub struct CreateArgs {
    /// The dataset whose images the weights are learned on.
    #[arg(value_name = "DATASET[:VERSION]")]
    target: Reference,
    /// A prompt to weigh: `name`, `name:2`, `name:production` or `name@sha256:…`. Repeat for each.
    #[arg(long = "source", value_name = "PROMPT", required = true)]
    sources: Vec<Reference>,
    /// The backbone; needed only if more than one fits the sources.
    #[arg(long, value_name = "NAME")]
    backbone: Option<ResourceName>,
    /// The images of the target that the weights are learned on.
    #[arg(long, default_value = "train", value_parser = split)]
    split: Split,
    /// Images that the result is evaluated on.
    #[arg(long, value_parser = split)]
    eval_split: Option<Split>,
    /// The most images to use [default: 2000].
    #[arg(long, value_name = "N")]
    max_samples: Option<usize>,
    /// Seed of the choice of images.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Objective as JSON, as in the API's `objective`, e.g. `{"trade_off": "knee"}`.
    #[arg(long, value_name = "JSON", value_parser = objective)]
    objective: Option<Value>,
    /// The prompt that the result becomes a version of.
    #[arg(long, value_name = "NAME")]
    output: Option<ResourceName>,
    /// Priority; ensembles with a smaller number go first [default: 100].
    #[arg(long)]
    priority: Option<i32>,
    /// Compute it even if the same was computed before.
    #[arg(long)]
    force: bool,
    /// Only print what it would cost.
    #[arg(long, conflicts_with = "watch")]
    dry_run: bool,
    /// Watch the ensemble after posting it.
    #[arg(long)]
    watch: bool,
    #[command(flatten)]
    server: ServerOptions,
}

#[derive(Clone, Debug, clap::Args)]
pub struct IdArgs {
    id: Uuid,
    #[command(flatten)]
    server: ServerOptions,
}

#[derive(Clone, Debug, clap::Args)]
pub struct ResultArgs {
    id: Uuid,
    /// Print the whole result as JSON, as the API gives it.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    server: ServerOptions,
}

/// The ensemble is over and has no weights.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Unsuccessful(String);

/// The fields of an ensemble that the client reads.
#[derive(Deserialize)]
struct Ensemble {
    id: Uuid,
    state: JobState,
    progress: Option<Progress>,
    error: Option<Refusal>,
}

#[derive(Clone, Deserialize)]
pub struct Progress {
    pub phase: String,
    pub done: u64,
    pub total: u64,
    pub per_second: Option<f64>,
    pub eta_seconds: Option<f64>,
}

#[derive(Deserialize)]
struct Refusal {
    code: String,
    detail: String,
}

#[derive(Deserialize)]
struct Events {
    items: Vec<Event>,
    last_seq: i32,
}

#[derive(Deserialize)]
struct Event {
    kind: String,
    data: Value,
}

#[derive(Deserialize)]
struct Outcome {
    source_weights: Vec<Weight>,
    composed_prompt: Composed,
}

#[derive(Deserialize)]
struct Weight {
    prompt: String,
    version: Option<i32>,
    weight: f64,
    standard_error: Option<f64>,
}

#[derive(Deserialize)]
struct Composed {
    prompt: Option<String>,
    version: Option<i32>,
}

fn split(text: &str) -> Result<Split, String> {
    let known = Split::ALL.into_iter().find(|split| split.name() == text);
    known.ok_or_else(|| "expected `train`, `val` or `test`".to_owned())
}

/// The JSON is checked here, so that a mistake in the shell's quoting is reported early.
fn objective(text: &str) -> Result<Value, String> {
    let document = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let mistakes = json::read::<Objective>(&document).mistakes;
    if mistakes.is_empty() {
        return Ok(document);
    }
    let said: Vec<_> = mistakes.iter().map(Mistake::to_string).collect();
    Err(said.join("\n"))
}

pub async fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Create(args) => create(*args).await,
        Command::Watch(args) => watch(&args.server.server()?, args.id).await,
        Command::Cancel(args) => cancel(&args.server.server()?, args.id).await,
        Command::Result(args) => {
            let server = args.server.server()?;
            let result: Value = server.json(get(&server, args.id, &["result"])).await?;
            match args.json {
                true => print(&format!("{}\n", serde_json::to_string_pretty(&result)?)),
                false => print(&shown(serde_json::from_value(result)?)),
            }
        }
    }
}

async fn create(args: CreateArgs) -> anyhow::Result<()> {
    let body = args.body();
    let server = args.server.server()?;
    if args.dry_run {
        let path = ["ensembles", "validate"];
        let plan: Value = server
            .json(server.request_json(Method::POST, &path, &body))
            .await?;
        return print(&format!("{}\n", serde_json::to_string_pretty(&plan)?));
    }
    // Posting again after a lost answer finds the existing ensemble, unless forced.
    let ensemble: Ensemble = server
        .json(server.request_json(Method::POST, &["ensembles"], &body))
        .await?;
    print(&format!("{}\n", ensemble.id))?;
    match args.watch {
        true => watch(&server, ensemble.id).await,
        false => Ok(()),
    }
}

impl CreateArgs {
    fn body(&self) -> Value {
        let prompt = |source: &Reference| json!({"prompt": source.to_string()});
        let mut body = json!({
            "target": {
                "dataset": self.target.to_string(),
                "split": self.split,
                "eval_split": self.eval_split,
                "seed": self.seed,
            },
            "sources": self.sources.iter().map(prompt).collect::<Vec<_>>(),
            "output": {"name": self.output.as_ref().map(ResourceName::as_str)},
            "force": self.force,
        });
        // Options that are not given get the server's defaults.
        if let Some(most) = self.max_samples {
            body["target"]["max_samples"] = json!(most);
        }
        if let Some(backbone) = &self.backbone {
            body["backbone"] = json!(backbone.as_str());
        }
        if let Some(objective) = &self.objective {
            body["objective"] = objective.clone();
        }
        if let Some(priority) = self.priority {
            body["priority"] = json!(priority);
        }
        body
    }
}

fn get(server: &Server, id: Uuid, rest: &[&str]) -> reqwest::RequestBuilder {
    let id = id.to_string();
    let path = [&["ensembles", &id], rest].concat();
    server.request(Method::GET, &path)
}

async fn cancel(server: &Server, id: Uuid) -> anyhow::Result<()> {
    let id = id.to_string();
    let request = server.request(Method::POST, &["ensembles", &id, "cancel"]);
    let ensemble: Ensemble = server.json(request).await?;
    match ensemble.state {
        JobState::Cancelled => print(&format!("{id}: cancelled\n")),
        _ => print(&format!("{id}: asked to stop\n")),
    }
}

/// Polls for news until the ensemble is over, and waits for a server that is briefly unreachable.
async fn watch(server: &Server, id: Uuid) -> anyhow::Result<()> {
    let mut phases = Phases::default();
    let mut after = 0;
    let mut answered = Instant::now();
    let ensemble = loop {
        match look(server, id, after, &mut phases).await {
            Ok((ensemble, last)) => {
                (after, answered) = (last, Instant::now());
                if ensemble.state.is_terminal() {
                    break ensemble;
                }
            }
            Err(ServerError::Unreachable { .. }) if answered.elapsed() < PATIENCE => {
                tokio::time::sleep(AGAIN).await;
            }
            Err(error) => return Err(error.into()),
        }
    };
    phases.finish();
    match (ensemble.state, ensemble.error) {
        (JobState::Succeeded, _) => {
            let outcome: Outcome = server.json(get(server, id, &["result"])).await?;
            print(&shown(outcome))
        }
        (state, Some(Refusal { code, detail })) => {
            let text = format!("the ensemble {}: {} ({code})", said(state), plain(&detail));
            Err(Unsuccessful(text).into())
        }
        (state, None) => Err(Unsuccessful(format!("the ensemble {}", said(state))).into()),
    }
}

fn said(state: JobState) -> &'static str {
    match state {
        JobState::Cancelled => "was cancelled",
        other => other.name(),
    }
}

/// Waits up to a second for the ensemble's end, shows what happened meanwhile, and returns the number of the last event
/// shown.
async fn look(
    server: &Server,
    id: Uuid,
    after: i32,
    phases: &mut Phases,
) -> Result<(Ensemble, i32), ServerError> {
    let wait = [("wait", "1".to_owned())];
    let path = ["ensembles", &id.to_string()];
    let request = server.request_with(Method::GET, &path, &wait);
    let ensemble: Ensemble = server.json(request).await?;
    let path = ["ensembles", &id.to_string(), "events"];
    let request = server.request_with(Method::GET, &path, &[("after", after.to_string())]);
    let events: Events = server.json(request).await?;
    for Event { kind, data } in events.items {
        phases.event(&kind, &data);
    }
    if let Some(progress) = &ensemble.progress
        && ensemble.state == JobState::Running
    {
        phases.progress(progress);
    }
    Ok((ensemble, events.last_seq))
}

fn shown(outcome: Outcome) -> String {
    let composed = match (
        outcome.composed_prompt.prompt,
        outcome.composed_prompt.version,
    ) {
        (Some(prompt), Some(version)) => format!("composed prompt: {prompt}:{version}\n"),
        _ => String::new(),
    };
    let rows = outcome.source_weights.into_iter().map(|source| {
        let version = source.version.map(|version| format!(":{version}"));
        let error = source.standard_error.map(|error| format!("± {error:.4}"));
        [
            source.prompt + &version.unwrap_or_default(),
            format!("{:.4}", source.weight),
            error.unwrap_or_default(),
        ]
    });
    table(["SOURCE", "WEIGHT", "STANDARD ERROR"], rows) + &composed
}

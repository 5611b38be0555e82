//! Migrations are tried on rows of the time before them.

use promptweave::db::MIGRATOR;
use promptweave_domain::composition::CompositionResult;
use promptweave_domain::method::Method;
use promptweave_domain::objective::Weighing;
use promptweave_domain::specification::JobSpec;
use serde_json::{Value, json};
use sqlx::types::Json;
use sqlx::{Executor as _, PgPool, Row as _};
use uuid::Uuid;

const RENAME_PUBLIC_WORDS: i64 = 20_261_130_230_000;

async fn migrate(pool: &PgPool, wanted: impl Fn(i64) -> bool) {
    for migration in MIGRATOR.iter().filter(|it| wanted(it.version)) {
        pool.execute(sqlx::raw_sql(migration.sql.clone()))
            .await
            .unwrap();
    }
}

fn digest() -> String {
    format!("sha256:{}", "0".repeat(64))
}

/// An ensemble's specification as it was stored before the words were renamed.
fn old_spec(objective: &Value) -> Value {
    let source =
        |name: &str| json!({"id": Uuid::nil(), "prompt": name, "version": 1, "digest": digest()});
    json!({
        "target": {
            "dataset": "emoji", "version": 1, "digest": digest(),
            "split": "train", "eval_split": "test", "max_samples": 2000, "seed": 0, "skip_bad": true,
        },
        "sources": [source("digits"), source("flowers")],
        "backbone": {
            "name": "tiny", "digest": digest(), "preprocessing_id": "98-bicubic-imagenet", "model_digest": digest(),
            "config": {
                "architecture": "vit_tiny", "embed_dim": 8, "depth": 1, "num_heads": 1, "patch_size": 14,
                "pos_grid": 7, "norm_eps": 1e-6,
                "preprocessing": {
                    "size": 98, "filter": "bicubic", "antialias": true,
                    "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
                },
            },
        },
        "objective": objective,
        "output": "emoji-1",
        "stop_when": {"weight_se": 0.01},
        "resolved_from": {"ensemble": Uuid::nil(), "statistics": digest()},
    })
}

/// A result as it was stored then.
fn old_result() -> Value {
    let source = |name: &str| {
        json!({"prompt": name, "h_score": 2.25, "log_me": -0.5, "head_temperature": 1.0, "head_loss": 1.5,
               "gradient_rms": 0.1})
    };
    let score = json!({"h_score": 2.4, "train_accuracy": 0.9, "eval_accuracy": 0.5});
    json!({
        "source_weights": [{"prompt": "digits", "version": 1, "digest": digest(), "weight": 1.0}],
        "method": {
            "name": "hgprompt_paper", "scores": null, "target_tuning_seconds": null, "uniform_share": 0.25,
            "uniform_shares": [{"uniform_share": 0.25, "validation_accuracy": 0.5, "validation_loss": 1.0}],
            "fallback": null, "scale": 0.5, "anchor": 7,
            "scales": [{"scale": 0.5, "validation_accuracy": 0.5, "validation_loss": 1.0}],
        },
        "objective": {"h_score": 2.5, "gradient_alignment": 1.5e-5, "alignment_weight": 2.0, "trade_off": null,
                      "total": -2.49997},
        "path": [{"trade_off": 0.0, "alignment_weight": 0.0, "h_score": 3.0, "gradient_alignment": 1e-5,
                  "weights": [1.0]}],
        "optima": [],
        "solver": {"starts": 1, "iterations": 1, "evaluations": 1, "stop_reason": "converged"},
        "diagnostics": {
            "num_samples": 100, "num_classes": 4, "skipped_images": 0, "head_folds": 1,
            "per_source": [source("digits")], "composed": score, "surrogate_gap": 0.0, "baselines": null,
        },
        "composed": {"prompt": "emoji-1", "version": 1, "digest": digest()},
        "early_stop": {"samples": 40, "of": 100, "asked": 0.01, "weight_se": 0.009},
        "provenance": {
            "backbone_digest": digest(), "preprocessing_id": "98-bicubic-imagenet", "sample_digest": digest(),
            "seed": 0, "device": "cpu", "num_threads": 1, "libtorch": "2.11.0", "version": "0.1.0",
            "resolved_from": digest(),
        },
        "warnings": [],
        "timings": {},
    })
}

async fn store(pool: &PgPool, spec: &Value, result: Option<Value>) -> Uuid {
    let id = Uuid::now_v7();
    let project: Uuid = sqlx::query_scalar("SELECT id FROM project LIMIT 1")
        .fetch_one(pool)
        .await
        .unwrap();
    let statistics = result.as_ref().map(|_| vec![0u8; 32]);
    sqlx::query(
        "INSERT INTO job (id, project_id, kind, priority, max_attempts, spec, spec_digest, state, result, statistics_digest,
                          finished_at)
         VALUES ($1, $2, 'ensemble', 100, 5, $3, $4, CASE WHEN $5::jsonb IS NULL THEN 'queued' ELSE 'succeeded' END,
                 $5, $6, CASE WHEN $5::jsonb IS NULL THEN NULL ELSE now() END)",
    )
    .bind(id)
    .bind(project)
    .bind(Json(spec))
    .bind(vec![0u8; 32])
    .bind(result.map(Json))
    .bind(statistics)
    .execute(pool)
    .await
    .unwrap();
    id
}

#[sqlx::test(migrations = false)]
async fn what_jobs_stored_by_the_old_words_is_read_by_the_new_ones(pool: PgPool) {
    migrate(&pool, |version| version < RENAME_PUBLIC_WORDS).await;
    let both = json!({
        "alignment_weight": 2.0, "refine": 0, "entropy": 0.5,
        "h_score": {"mode": "inv", "standardise": "per_source", "shrinkage": 0.01},
        "alignment": {"reading": "R2", "gradient_norm": "rms"},
        "head": {"kind": "lda", "shrinkage": 0.3}, "align_tokens": "off", "fallback": "none",
    });
    let paper = json!({"method": "hgprompt_paper", "trade_off": 0.25, "uniform_share": "auto", "anchor": 3, "scale": 0.5});
    let spot = json!({
        "method": "spot", "spot": {"similarity": "token_mean", "top_k": 2, "choice": "best_of"},
        "target_tuning": {"epochs": 7},
    });
    let best =
        json!({"method": "single_best", "single_best": {"by": "log_me"}, "fallback": "none"});
    let mut ids = Vec::new();
    for objective in [&both, &paper, &spot, &best, &json!({})] {
        ids.push(store(&pool, &old_spec(objective), Some(old_result())).await);
    }
    migrate(&pool, |version| version >= RENAME_PUBLIC_WORDS).await;

    let mut objectives = Vec::new();
    for id in ids {
        let row = sqlx::query("SELECT kind, spec, result FROM job WHERE id = $1")
            .bind(id)
            .fetch_one(&pool)
            .await
            .unwrap();
        let spec = JobSpec::read(row.get("kind"), row.get("spec")).unwrap();
        let JobSpec::Ensemble(spec) = spec else {
            panic!("an ensemble");
        };
        assert!(spec.target.samples.skip_unreadable);
        assert_eq!(spec.early_stopping.unwrap().max_standard_error, 0.01);
        assert!(spec.solved_from.is_some());
        objectives.push(spec.objective);

        let result: CompositionResult = serde_json::from_value(row.get("result")).unwrap();
        assert_eq!(result.method.name, Method::Hgprompt);
        assert_eq!(result.method.uniform_mix, 0.25);
        assert_eq!(result.method.uniform_mix_candidates[0].uniform_mix, 0.25);
        assert_eq!(result.method.anchor_seed, Some(7));
        assert_eq!(result.method.scale_candidates.len(), 1);
        assert_eq!(result.pareto_path.len(), 1);
        assert_eq!(result.composed_prompt.version, Some(1));
        assert!(result.diagnostics.composed_score.is_some());
        assert_eq!(result.diagnostics.per_source[0].logme, Some(-0.5));
        assert!(result.provenance.solved_from.is_some());
        let early = result.early_stop.unwrap();
        assert_eq!((early.total_samples, early.requested), (100, 0.01));
    }
    let [both, paper, spot, best, nothing] = objectives.try_into().unwrap();
    assert_eq!(both.method(), Method::HgpromptCv);
    assert_eq!(both.weighing(), Weighing::AlignmentWeight(2.0));
    assert_eq!(both.experimental.entropy, 0.5);
    let alignment = json!(both.alignment().unwrap());
    let renamed = json!({"variant": "mixture_uniform", "gradient_normalization": "rms"});
    assert_eq!(alignment, renamed);
    assert_eq!(paper.method(), Method::Hgprompt);
    assert_eq!(paper.weighing(), Weighing::TradeOff(0.25));
    assert_eq!(paper.experimental.anchor_seed, Some(3));
    let spot = json!(spot);
    assert_eq!(spot["top_k"], 2);
    assert_eq!(spot["target_epochs"], 7);
    assert_eq!(json!(best)["by"], "logme");
    assert_eq!(nothing.method(), Method::HgpromptCv);
}

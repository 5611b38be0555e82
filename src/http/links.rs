//! OpenAPI links: which operations can follow an answer, and which parameters they take from it. Clients generated from
//! the document, and stateful fuzzers, follow them.

use utoipa::openapi::link::LinkBuilder;
use utoipa::openapi::{OpenApi, RefOr};

use crate::http::openapi::operations;

/// Links from the successes of some operations to other operations, by id. A new resource adds its own here;
/// `tests/it/links.rs` checks that both ends exist and fit.
struct Links {
    from: &'static [&'static str],
    to: &'static [&'static str],
    /// Parameters of the target operations, and where their values are in the answer.
    with: &'static [(&'static str, &'static str)],
}

const LINKS: &[Links] = &[
    Links {
        from: &[
            "create_prompt",
            "get_prompt",
            "change_prompt",
            "restore_prompt",
        ],
        to: &[
            "get_prompt",
            "change_prompt",
            "delete_prompt",
            "restore_prompt",
            "publish_version",
            "list_versions",
            "list_aliases",
        ],
        with: &[("name", "/name")],
    },
    Links {
        from: &[
            "publish_version",
            "compose_prompt",
            "import_peft",
            "get_version",
            "deprecate_version",
            "undeprecate_version",
        ],
        to: &[
            "get_version",
            "get_content",
            "get_lineage",
            "export_peft",
            "deprecate_version",
            "undeprecate_version",
        ],
        with: &[("name", "/prompt"), ("ref", "/version")],
    },
    Links {
        from: &["publish_version", "import_peft"],
        to: &["get_prompt", "list_versions"],
        with: &[("name", "/prompt")],
    },
    Links {
        from: &["list_prompts"],
        to: &["get_prompt"],
        with: &[("name", "/items/0/name")],
    },
    Links {
        from: &["list_versions"],
        to: &["get_version"],
        with: &[("name", "/items/0/prompt"), ("ref", "/items/0/version")],
    },
    Links {
        from: &["set_alias", "get_alias"],
        to: &["get_alias", "delete_alias", "list_alias_history"],
        with: &[("name", "/prompt"), ("alias", "/alias")],
    },
    Links {
        from: &["set_alias", "get_alias"],
        to: &["get_version"],
        with: &[("name", "/prompt"), ("ref", "/alias")],
    },
    // Links a version to its sources.
    Links {
        from: &["get_lineage"],
        to: &["get_version"],
        with: &[("name", "/nodes/1/prompt"), ("ref", "/nodes/1/version")],
    },
    Links {
        from: &["register_backbone", "upload_backbone"],
        to: &["get_backbone"],
        with: &[("name", "/name")],
    },
    Links {
        from: &["register_dataset", "upload_dataset"],
        to: &["get_dataset", "upload_dataset"],
        with: &[("name", "/name")],
    },
    // `revoke_api_key` is left out: one of the listed keys is the one that asks.
    Links {
        from: &["create_api_key"],
        to: &["get_api_key", "revoke_api_key"],
        with: &[("id", "/id")],
    },
    Links {
        from: &["list_api_keys"],
        to: &["get_api_key"],
        with: &[("id", "/items/0/id")],
    },
    Links {
        from: &["create_webhook", "get_webhook", "change_webhook"],
        to: &[
            "get_webhook",
            "change_webhook",
            "delete_webhook",
            "test_webhook",
            "list_webhook_deliveries",
        ],
        with: &[("id", "/id")],
    },
    Links {
        from: &["list_webhooks"],
        to: &["get_webhook"],
        with: &[("id", "/items/0/id")],
    },
    Links {
        from: &["test_webhook", "get_webhook_delivery", "redeliver"],
        to: &["get_webhook_delivery", "redeliver"],
        with: &[("id", "/webhook_id"), ("delivery_id", "/id")],
    },
    Links {
        from: &["list_webhook_deliveries"],
        to: &["get_webhook_delivery"],
        with: &[
            ("id", "/items/0/webhook_id"),
            ("delivery_id", "/items/0/id"),
        ],
    },
    Links {
        from: &["create_project"],
        to: &["get_project"],
        with: &[("name", "/name")],
    },
    Links {
        from: &[
            "create_ensemble",
            "solve_ensemble",
            "replay_ensemble",
            "retry_ensemble",
            "get_ensemble",
        ],
        to: &[
            "get_ensemble",
            "get_ensemble_result",
            "get_ensemble_statistics",
            "list_ensemble_events",
            "cancel_ensemble",
            "retry_ensemble",
            "replay_ensemble",
            "solve_ensemble",
        ],
        with: &[("id", "/id")],
    },
    Links {
        from: &["cancel_ensemble"],
        to: &["get_ensemble", "list_ensemble_events", "retry_ensemble"],
        with: &[("id", "/id")],
    },
    Links {
        from: &["list_ensembles"],
        to: &["get_ensemble"],
        with: &[("id", "/items/0/id")],
    },
    Links {
        from: &[
            "create_tuning",
            "retry_tuning",
            "get_tuning",
            "cancel_tuning",
        ],
        to: &[
            "get_tuning",
            "get_tuning_result",
            "list_tuning_events",
            "cancel_tuning",
            "retry_tuning",
        ],
        with: &[("id", "/id")],
    },
    Links {
        from: &["list_tunings"],
        to: &["get_tuning"],
        with: &[("id", "/items/0/id")],
    },
    Links {
        from: &[
            "create_ranking",
            "retry_ranking",
            "get_ranking",
            "cancel_ranking",
        ],
        to: &[
            "get_ranking",
            "get_ranking_result",
            "list_ranking_events",
            "cancel_ranking",
            "retry_ranking",
        ],
        with: &[("id", "/id")],
    },
    Links {
        from: &["list_rankings"],
        to: &["get_ranking"],
        with: &[("id", "/items/0/id")],
    },
    Links {
        from: &[
            "create_prediction",
            "retry_prediction",
            "get_prediction",
            "cancel_prediction",
        ],
        to: &[
            "get_prediction",
            "get_prediction_result",
            "get_prediction_file",
            "list_prediction_events",
            "cancel_prediction",
            "retry_prediction",
        ],
        with: &[("id", "/id")],
    },
    Links {
        from: &["list_predictions"],
        to: &["get_prediction"],
        with: &[("id", "/items/0/id")],
    },
];

/// Adds the links to the answers of status 2xx. A link is named after the operation that it leads to.
pub(super) fn document(document: &mut OpenApi) {
    for (_, _, operation) in operations(document) {
        let id = operation.operation_id.as_deref().unwrap_or_default();
        let links: Vec<_> = LINKS.iter().filter(|it| it.from.contains(&id)).collect();
        for (status, response) in &mut operation.responses.responses {
            let RefOr::T(response) = response else {
                continue;
            };
            if !status.starts_with('2') {
                continue;
            }
            for links in &links {
                for target in links.to {
                    let mut link = LinkBuilder::new().operation_id(*target);
                    for (parameter, place) in links.with {
                        link = link.parameter(*parameter, format!("$response.body#{place}"));
                    }
                    let name = (*target).to_owned();
                    response.links.insert(name, RefOr::T(link.build()));
                }
            }
        }
    }
}

//! No string from a client becomes a path: every string in the API's document (in paths, queries, headers and bodies)
//! is replaced, one at a time, by text that has led out of other servers' folders.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use axum::body::Body;
use axum::http::{Method, Request, header};
use promptweave::db::MIGRATOR;
use promptweave::registry::DEFAULT_PROJECT;
use promptweave_domain::api_key::Scope;
use serde_json::{Map, Value, json};
use sqlx::PgPool;

use crate::app::TestApp;
use crate::ensembles::furnished;

const CANARY: &str = "promptweave-canary-5f1d";

/// Hostile texts, as they are sent: an escaped one reaches the server escaped.
fn corpus(secret: &Path) -> Vec<String> {
    let secret = secret.display();
    let mut corpus: Vec<String> = [
        "../secret",
        "../../../../../../../../etc/passwd",
        "..%2fsecret",
        "%2e%2e%2fsecret",
        "%252e%252e%252fsecret",
        "..%c0%afsecret",
        "..%5csecret",
        "..\\secret",
        "....//secret",
        "pets/../../secret",
        "pets/../secret",
        "./../secret",
        "..;/secret",
        "~root/.profile",
        "file:///etc/passwd",
        "pets%00/../../secret",
        "..",
        ".",
        "/",
        "pets/train",
        "leads-out",
        "leads-out/cat",
    ]
    .map(str::to_owned)
    .into();
    corpus.extend([
        format!("{secret}"),
        format!("/{secret}"),
        format!("file://{secret}"),
    ]);
    corpus
}

/// A value that a schema allows; strings come from their examples.
fn sample(document: &Value, schema: &Value) -> Value {
    if let Some(reference) = schema["$ref"].as_str() {
        return sample(document, document.pointer(&reference[1..]).unwrap());
    }
    if let Some(example) = schema.get("example") {
        return example.clone();
    }
    for of in ["oneOf", "anyOf"] {
        if let Some(variants) = schema[of].as_array() {
            let variant = variants.iter().find(|it| it["type"] != "null").unwrap();
            return sample(document, variant);
        }
    }
    let mut members = Map::new();
    for part in schema["allOf"].as_array().into_iter().flatten() {
        if let Value::Object(more) = sample(document, part) {
            members.extend(more);
        }
    }
    for (name, schema) in schema["properties"].as_object().into_iter().flatten() {
        members.insert(name.clone(), sample(document, schema));
    }
    let kind = match &schema["type"] {
        Value::Array(kinds) => kinds.iter().find(|it| *it != "null").unwrap(),
        kind => kind,
    };
    match kind.as_str() {
        Some("array") => json!([sample(document, &schema["items"])]),
        Some("string") => match schema["enum"].as_array() {
            Some(variants) => variants[0].clone(),
            None => json!("dtd"),
        },
        Some("integer" | "number") => schema.get("minimum").cloned().unwrap_or(json!(1)),
        Some("boolean") => json!(false),
        _ => Value::Object(members),
    }
}

/// Pointers to all strings in a value; a free-form object gets one.
fn strings(value: &Value, at: String, found: &mut Vec<String>) {
    match value {
        Value::String(_) => found.push(at),
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                strings(item, format!("{at}/{index}"), found);
            }
        }
        Value::Object(members) => {
            for (name, member) in members {
                strings(member, format!("{at}/{}", name.replace('/', "~1")), found);
            }
        }
        _ => {}
    }
}

/// Every file and folder below `dir`.
fn everything(dir: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
        if entry.file_type().unwrap().is_dir() {
            found.extend(everything(&entry.path()));
        }
        found.insert(entry.path());
    }
    found
}

struct Probe<'a> {
    app: &'a TestApp,
    key: String,
    sent: usize,
}

impl Probe<'_> {
    async fn send(
        &mut self,
        method: &Method,
        path: &str,
        headers: &[(&str, &str)],
        body: Option<(&str, String)>,
    ) {
        let what = format!("{method} {path} {headers:?} {body:?}");
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::AUTHORIZATION, &self.key)
            .header(header::IF_MATCH, "\"0\"");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let body = match body {
            Some((kind, text)) => {
                request = request.header(header::CONTENT_TYPE, kind);
                Body::from(text)
            }
            None => Body::empty(),
        };
        // HTTP itself refuses this as a path or a header.
        let Ok(request) = request.body(body) else {
            return;
        };
        self.sent += 1;
        let answer = self.app.send_as_is(request).await;
        assert!(!answer.status.is_server_error(), "{what}: {answer:?}");
        let text = String::from_utf8_lossy(&answer.body);
        assert!(
            !text.contains(CANARY) && !text.contains("root:x:0"),
            "{what}: {text}"
        );
    }
}

fn escaped(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    text.bytes()
        .map(|byte| {
            if plain(byte) {
                char::from(byte).to_string()
            } else {
                format!("%{byte:02X}")
            }
        })
        .collect()
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn no_string_of_a_client_leads_out(pool: PgPool) {
    let app = furnished(pool).await;
    let secret = app.dir.path().join("secret");
    for folder in ["cat", "dog", "train/cat"] {
        fs::create_dir_all(secret.join(folder)).unwrap();
        fs::write(secret.join(folder).join("1.png"), CANARY).unwrap();
    }
    fs::write(secret.join("config.json"), format!("{{\"{CANARY}\": 1}}")).unwrap();
    fs::write(secret.join("model.safetensors"), CANARY).unwrap();
    std::os::unix::fs::symlink(
        &secret,
        app.root("pets").parent().unwrap().join("leads-out"),
    )
    .unwrap();
    let blobs = app.dir.path().join("blobs");
    let outside = |all: BTreeSet<PathBuf>| -> BTreeSet<PathBuf> {
        all.into_iter()
            .filter(|path| !path.starts_with(&blobs))
            .collect()
    };
    let before = outside(everything(app.dir.path()));

    let document = serde_json::to_value(promptweave::http::openapi::openapi()).unwrap();
    let key = format!(
        "Bearer {}",
        app.make_key(DEFAULT_PROJECT, &Scope::ALL).await
    );
    let mut probe = Probe {
        app: &app,
        key,
        sent: 0,
    };
    let corpus = corpus(&secret);
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            let method: Method = method.to_uppercase().parse().unwrap();
            let good = path
                .replace("{id}", "00000000-0000-0000-0000-000000000000")
                .replace("{delivery_id}", "00000000-0000-0000-0000-000000000000")
                .replace("{name}", "digits")
                .replace("{ref}", "1")
                .replace("{alias}", "production");
            let body = operation["requestBody"]["content"]
                .as_object()
                .and_then(|content| content.iter().next());
            let body = body.map(|(kind, content)| {
                let json = kind
                    .ends_with("json")
                    .then(|| sample(&document, &content["schema"]));
                (kind.as_str(), json)
            });
            let with = |json: Option<&Value>| {
                body.as_ref().map(|(kind, _)| {
                    (
                        *kind,
                        json.map_or("not a file".to_owned(), Value::to_string),
                    )
                })
            };
            let usual = body.as_ref().and_then(|(_, json)| json.clone());
            for hostile in &corpus {
                for parameter in operation["parameters"].as_array().into_iter().flatten() {
                    let name = parameter["name"].as_str().unwrap();
                    match parameter["in"].as_str().unwrap() {
                        "path" => {
                            // The text is sent unchanged, with its slashes, and fully escaped.
                            for text in [hostile.clone(), escaped(hostile)] {
                                let values = [
                                    "00000000-0000-0000-0000-000000000000",
                                    "00000000-0000-0000-0000-000000000000",
                                    "digits",
                                    "1",
                                    "production",
                                ];
                                let mut bad = path.replace(&format!("{{{name}}}"), &text);
                                for (other, value) in
                                    ["{id}", "{delivery_id}", "{name}", "{ref}", "{alias}"]
                                        .iter()
                                        .zip(values)
                                {
                                    bad = bad.replace(other, value);
                                }
                                probe.send(&method, &bad, &[], with(usual.as_ref())).await;
                            }
                        }
                        "query" => {
                            let bad = format!("{good}?{name}={}", escaped(hostile));
                            probe.send(&method, &bad, &[], with(usual.as_ref())).await;
                        }
                        _ => {
                            probe
                                .send(&method, &good, &[(name, hostile)], with(usual.as_ref()))
                                .await
                        }
                    }
                }
                let mut places = Vec::new();
                if let Some(json) = &usual {
                    strings(json, String::new(), &mut places);
                }
                for place in places {
                    let mut json = usual.clone().unwrap();
                    *json.pointer_mut(&place).unwrap() = json!(hostile);
                    // Only one of these two may be given.
                    for (this, other) in [("/directory", "uri"), ("/uri", "directory")] {
                        if place == this {
                            json.as_object_mut().unwrap().remove(other);
                        }
                    }
                    probe.send(&method, &good, &[], with(Some(&json))).await;
                }
            }
        }
    }
    assert!(probe.sent > 2000, "{}", probe.sent);
    assert_eq!(outside(everything(app.dir.path())), before);
    // Stored files are named by their digests.
    for path in everything(&blobs).iter().filter(|path| path.is_file()) {
        let name = path.file_name().unwrap().to_str().unwrap();
        assert!(
            name.len() >= 60 && name.bytes().all(|b| b.is_ascii_hexdigit()),
            "{path:?}"
        );
    }
}

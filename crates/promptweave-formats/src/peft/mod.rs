//! PEFT's prompt-tuning adapters, imported and exported. An adapter is a folder with
//! `adapter_config.json` and `adapter_model.safetensors`, whose one tensor has the prompt file's
//! own name.
//!
//! An import keeps `adapter_model.safetensors` unchanged. It is a prompt file already, and the same
//! bytes have the same digest here and where they were trained. Its configuration goes into the
//! training record, from which an export takes it back.

pub mod archive;

use safetensors::{SafeTensors, serialize};
use serde_json::{Map, Value, json};

use promptweave_domain::prompt_file::PromptFile;

pub const CONFIG_FILE: &str = "adapter_config.json";
pub const MODEL_FILE: &str = "adapter_model.safetensors";
/// Longest `adapter_config.json` accepted, in bytes; PEFT's own have half a kilobyte.
pub const MAX_CONFIG_BYTES: usize = 64 << 10;

/// The field of an import's training record that holds the adapter's configuration.
const RECORD: &str = "adapter_config";
const PROMPT_TUNING: &str = "PROMPT_TUNING";

#[derive(Debug, thiserror::Error)]
pub enum PeftError {
    #[error("`{CONFIG_FILE}` has {0} bytes, more than {MAX_CONFIG_BYTES}")]
    ConfigTooLong(usize),
    #[error("`{CONFIG_FILE}` is not a JSON object")]
    Config(#[source] Option<serde_json::Error>),
    #[error(
        "`peft_type` is {0}, and only \"PROMPT_TUNING\" adapters are visual prompts: their one tensor \
         is what goes into the backbone"
    )]
    OtherAdapter(Value),
    #[error(
        "`{field}` is {said}, and `prompt_embeddings` in `{MODEL_FILE}` has {found}; they must agree"
    )]
    Disagrees {
        field: &'static str,
        said: Value,
        found: usize,
    },
    #[error("PEFT has no deep prompts; `GET …/content` has the file with all of them")]
    Deep,
}

impl PeftError {
    /// The field of `adapter_config.json` at fault.
    pub fn field(&self) -> Option<&'static str> {
        match self {
            Self::OtherAdapter(_) => Some("peft_type"),
            Self::Disagrees { field, .. } => Some(field),
            Self::ConfigTooLong(_) | Self::Config(_) | Self::Deep => None,
        }
    }
}

/// The `adapter_config.json` of a prompt-tuning adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterConfig(Map<String, Value>);

impl AdapterConfig {
    pub fn parse(bytes: &[u8]) -> Result<Self, PeftError> {
        if bytes.len() > MAX_CONFIG_BYTES {
            return Err(PeftError::ConfigTooLong(bytes.len()));
        }
        let config = match serde_json::from_slice(bytes) {
            Ok(Value::Object(config)) => Self(config),
            Ok(_) => return Err(PeftError::Config(None)),
            Err(error) => return Err(PeftError::Config(Some(error))),
        };
        match config.get("peft_type") {
            Value::String(kind) if kind == PROMPT_TUNING => Ok(config),
            other => Err(PeftError::OtherAdapter(other.clone())),
        }
    }

    /// Checks that the configuration agrees with this prompt's number of tokens and width.
    pub fn check(&self, prompt: &PromptFile) -> Result<(), PeftError> {
        let agrees = |field: &'static str, found: usize| match self.get(field) {
            Value::Null => Ok(()),
            said if said.as_u64() == Some(found as u64) => Ok(()),
            said => Err(PeftError::Disagrees {
                field,
                said: said.clone(),
                found,
            }),
        };
        // An encoder's and a decoder's prompt, one after the other, do not make one prompt.
        agrees("num_transformer_submodules", 1)?;
        agrees("num_virtual_tokens", prompt.num_tokens())?;
        agrees("token_dim", prompt.embed_dim())
    }

    /// The training record of a prompt that came with this configuration.
    pub fn record(self) -> Value {
        json!({ RECORD: self.0 })
    }

    fn get(&self, field: &str) -> &Value {
        self.0.get(field).unwrap_or(&Value::Null)
    }
}

/// The numbers of the backbone's layers that an export states, if the backbone is registered.
#[derive(Clone, Copy, Debug)]
pub struct Layers {
    pub num_layers: usize,
    pub num_attention_heads: usize,
}

/// The two files of an adapter: configuration and weights.
#[derive(Clone, Debug)]
pub struct Adapter {
    pub config: Vec<u8>,
    pub model: Vec<u8>,
}

/// Exports a prompt as an adapter. `bytes` is the file that was read as `prompt`. Its numbers are
/// copied bit by bit, in their own dtype; head and sketch are left out.
pub fn export(
    bytes: &[u8],
    prompt: &PromptFile,
    training: Option<&Value>,
    layers: Option<Layers>,
) -> Result<Adapter, PeftError> {
    if prompt.deep_prompt_embeddings.is_some() {
        return Err(PeftError::Deep);
    }
    let recorded = training
        .and_then(|t| t.get(RECORD))
        .and_then(Value::as_object);
    let mut config = recorded.cloned().unwrap_or_else(|| {
        let layers = layers
            .map(|l| (l.num_layers, l.num_attention_heads))
            .unzip();
        let fields = json!({
            "auto_mapping": null,
            "base_model_name_or_path": null,
            "inference_mode": true,
            "modules_to_save": null,
            "num_attention_heads": layers.1,
            "num_layers": layers.0,
            "prompt_tuning_init": "RANDOM",
            "prompt_tuning_init_text": null,
            "revision": null,
            "task_type": null,
            "tokenizer_kwargs": null,
            "tokenizer_name_or_path": null,
        });
        fields.as_object().cloned().unwrap_or_default()
    });
    // The record may contain anything, but these fields are known from the weights.
    for (field, value) in [
        ("peft_type", json!(PROMPT_TUNING)),
        ("num_transformer_submodules", json!(1)),
        ("num_virtual_tokens", json!(prompt.num_tokens())),
        ("token_dim", json!(prompt.embed_dim())),
    ] {
        config.insert(field.to_owned(), value);
    }
    let file = SafeTensors::deserialize(bytes).expect("it was read before");
    let stored = file
        .tensor("prompt_embeddings")
        .expect("it was read before");
    let shape = prompt.prompt_embeddings.shape.clone();
    let view = safetensors::tensor::TensorView::new(stored.dtype(), shape, stored.data())
        .expect("a leading axis of 1 changes no size");
    // PEFT writes this one metadata key, by which PyTorch may read the file.
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    Ok(Adapter {
        config: serde_json::to_vec_pretty(&config).expect("plain data"),
        model: serialize([("prompt_embeddings", view)], Some(metadata)).expect("one tensor"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use promptweave_domain::testing::prompt_file;

    fn config(changes: Value) -> Result<AdapterConfig, PeftError> {
        let mut fields = json!({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3});
        let changes = changes.as_object().unwrap().clone();
        fields.as_object_mut().unwrap().extend(changes);
        AdapterConfig::parse(fields.to_string().as_bytes())
    }

    #[test]
    fn other_adapters_and_other_sizes_are_refused_by_field() {
        let prompt = prompt_file(3, 8, 1);
        let good = config(json!({"token_dim": 8, "num_transformer_submodules": 1})).unwrap();
        good.check(&prompt).unwrap();
        config(json!({"token_dim": null}))
            .unwrap()
            .check(&prompt)
            .unwrap();

        let refusal = config(json!({"peft_type": "LORA"})).unwrap_err();
        assert_eq!(refusal.field(), Some("peft_type"));
        for (field, value) in [
            ("num_virtual_tokens", json!(4)),
            ("num_virtual_tokens", json!("3")),
            ("token_dim", json!(16)),
            ("num_transformer_submodules", json!(2)),
        ] {
            let refusal = config(json!({ field: value })).unwrap().check(&prompt);
            assert_eq!(refusal.unwrap_err().field(), Some(field));
        }
        assert!(matches!(
            AdapterConfig::parse(b"[]"),
            Err(PeftError::Config(None))
        ));
        assert!(matches!(
            AdapterConfig::parse(b"{"),
            Err(PeftError::Config(Some(_)))
        ));
        let long = vec![b' '; MAX_CONFIG_BYTES + 1];
        assert!(matches!(
            AdapterConfig::parse(&long),
            Err(PeftError::ConfigTooLong(_))
        ));
    }

    #[test]
    fn an_export_reads_back_and_keeps_what_the_import_recorded() {
        let prompt = prompt_file(3, 8, 1);
        let bytes = prompt.to_bytes();
        let record = config(json!({"task_type": "CAUSAL_LM", "num_virtual_tokens": 99}));
        let record = record.unwrap().record();
        let adapter = export(&bytes, &prompt, Some(&record), None).unwrap();
        let read = AdapterConfig::parse(&adapter.config).unwrap();
        let model = PromptFile::parse(&adapter.model).unwrap();
        read.check(&model).unwrap();
        assert_eq!(read.get("task_type"), "CAUSAL_LM");
        assert_eq!(model.prompt_embeddings, prompt.prompt_embeddings);
        // Any other training record is not a configuration.
        let layers = Layers {
            num_layers: 12,
            num_attention_heads: 6,
        };
        let plain = export(&bytes, &prompt, Some(&json!({"epochs": 3})), Some(layers)).unwrap();
        let read = AdapterConfig::parse(&plain.config).unwrap();
        assert_eq!(
            (read.get("num_layers"), read.get("epochs")),
            (&json!(12), &Value::Null)
        );
    }
}

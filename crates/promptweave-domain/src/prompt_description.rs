//! The description of a prompt that people write. All of it may change.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

const MAX_DESCRIPTION: usize = 4096;
const MAX_TAGS: usize = 64;
const MAX_TAG: usize = 256;
const MAX_METADATA: usize = 16 << 10;
const MAX_CARD: usize = 64 << 10;

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PromptDescription {
    /// A description in a line or two.
    #[schema(max_length = 4096)]
    pub description: String,
    /// Tags to find the prompt by (`?tag=domain=texture`): at most 64, with keys of 1 to 256 bytes
    /// without `=` and values of at most 256 bytes.
    #[schema(example = json!({"domain": "texture"}))]
    pub tags: BTreeMap<String, String>,
    /// Free JSON, at most 16 KiB.
    #[schema(value_type = Object, example = json!({"owner": {"team": "vision"}}))]
    pub metadata: Map<String, Value>,
    /// The model card, in Markdown.
    #[schema(max_length = 65536, example = "# DTD\nTuned on 1,000 textures.")]
    pub card: String,
}

/// A field that breaks its rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BrokenRule {
    /// Path of the field: `description`, or `tags` and the tag's key.
    pub path: Vec<String>,
    pub rule: String,
}

impl PromptDescription {
    pub fn check(&self) -> Result<(), BrokenRule> {
        let broken = |path: &[&str], rule: String| {
            let path = path.iter().map(|&part| part.to_owned()).collect();
            Err(BrokenRule { path, rule })
        };
        if self.description.chars().count() > MAX_DESCRIPTION {
            let rule = format!("has more than {MAX_DESCRIPTION} characters");
            return broken(&["description"], rule);
        }
        if self.tags.len() > MAX_TAGS {
            return broken(&["tags"], format!("has more than {MAX_TAGS} entries"));
        }
        for (key, value) in &self.tags {
            if key.is_empty() || key.len().max(value.len()) > MAX_TAG {
                let rule = format!("keys have 1 to {MAX_TAG} bytes, values at most {MAX_TAG}");
                return broken(&["tags", key], rule);
            }
            // `?tag=a=b` would be ambiguous: the value b of a, or the tag `a=b`.
            if key.contains('=') {
                return broken(&["tags", key], "keys have no `=`".to_owned());
            }
        }
        let size = serde_json::to_vec(&self.metadata).map_or(usize::MAX, |json| json.len());
        if size > MAX_METADATA {
            let rule = format!("is {size} bytes of JSON, more than {MAX_METADATA}");
            return broken(&["metadata"], rule);
        }
        if self.card.chars().count() > MAX_CARD {
            let rule = format!("has more than {MAX_CARD} characters");
            return broken(&["card"], rule);
        }
        Ok(())
    }
}

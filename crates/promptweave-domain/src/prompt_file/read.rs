//! Reading a prompt file: names, dtypes, shapes and values, each checked before the next.

use safetensors::{Dtype, SafeTensors};

use crate::foreign_format;
use crate::prompt_file::error::PromptFileError;
use crate::prompt_file::metadata::{METADATA_KEY, PromptMetadata};
use crate::prompt_file::{Head, PromptFile, Sketch};
use crate::tensor::{Tensor, read_f32, read_i64};
use crate::words::PromptDtype;

/// The longest prompt accepted, in tokens (VPT's own grid ends at 200).
pub const MAX_TOKENS: usize = 4096;
/// The widest prompt accepted (the largest public ViT, with 22 B parameters, has 6144).
pub const MAX_EMBED_DIM: usize = 16_384;

const PROMPT: &str = "prompt_embeddings";
const NAMES: [&str; 6] = [
    PROMPT,
    "deep_prompt_embeddings",
    "head.weight",
    "head.bias",
    "sketch.features",
    "sketch.labels",
];

impl PromptFile {
    /// Reads and checks a prompt file: format, names, dtypes, shapes, finite values.
    pub fn parse(bytes: &[u8]) -> Result<Self, PromptFileError> {
        if !foreign_format::starts_as_safetensors(bytes) {
            if let Some(format) = foreign_format::recognise(bytes) {
                return Err(PromptFileError::Foreign(format));
            }
            if bytes.get(8) == Some(&b'{') {
                return Err(PromptFileError::HeaderTooLong);
            }
        }
        let file = SafeTensors::deserialize(bytes).map_err(PromptFileError::NotSafetensors)?;
        let (_, header) =
            SafeTensors::read_metadata(bytes).map_err(PromptFileError::NotSafetensors)?;
        let metadata = header.metadata().as_ref().and_then(|m| m.get(METADATA_KEY));
        let metadata = metadata
            .map(|json| PromptMetadata::read(json))
            .transpose()?;
        check_names(&file, |name| NAMES.contains(&name))?;
        let tensors = Tensors {
            file: &file,
            prefix: "",
        };

        let dtype = match file.tensor(PROMPT).map(|t| t.dtype()) {
            Ok(Dtype::F16) => PromptDtype::F16,
            Ok(Dtype::BF16) => PromptDtype::Bf16,
            _ => PromptDtype::F32,
        };
        let prompt_embeddings = tensors.prompt()?.ok_or_else(|| tensors.missing(PROMPT))?;
        let [m, d] = [prompt_embeddings.shape[0], prompt_embeddings.shape[1]];
        let deep_prompt_embeddings = tensors.float("deep_prompt_embeddings")?;
        if let Some(deep) = &deep_prompt_embeddings
            && (deep.shape.len() != 3 || deep.shape[0] == 0 || deep.shape[1..] != [m, d])
        {
            return Err(shape(
                "deep_prompt_embeddings",
                &deep.shape,
                &format!("[L-1, {m}, {d}]"),
            ));
        }
        let head = tensors.head(d)?;
        let sketch = tensors.sketch(d)?;
        let classes = metadata.as_ref().and_then(|m| m.classes.as_ref());
        check_classes(classes.map(Vec::len), head.as_ref(), sketch.as_ref())?;
        Ok(Self {
            metadata,
            prompt_embeddings,
            deep_prompt_embeddings,
            head,
            sketch,
            dtype: dtype.name(),
        })
    }
}

pub(crate) fn shape(tensor: &str, shape: &[usize], expected: &str) -> PromptFileError {
    PromptFileError::Shape {
        tensor: tensor.to_owned(),
        shape: shape.to_vec(),
        expected: expected.to_owned(),
    }
}

/// Checks that K is the same throughout: the number of class names, if the file has them, of the
/// head's rows, and of the sketch's labels.
fn check_classes(
    classes: Option<usize>,
    head: Option<&Head>,
    sketch: Option<&Sketch>,
) -> Result<(), PromptFileError> {
    let rows = head.map(|head| head.weight.shape[0]);
    if let (Some(classes), Some(head)) = (classes, head)
        && head.weight.shape[0] != classes
    {
        let expected = format!("[K, d] with K = {classes}, the number of `classes`");
        return Err(shape("head.weight", &head.weight.shape, &expected));
    }
    let Some(sketch) = sketch else { return Ok(()) };
    let bound = classes.or(rows);
    let outside = |label: &i64| *label < 0 || bound.is_some_and(|k| *label >= k as i64);
    match sketch.labels.values.iter().position(outside) {
        None => Ok(()),
        Some(index) => Err(PromptFileError::Label {
            tensor: "sketch.labels",
            index,
            label: sketch.labels.values[index],
            expected: match bound {
                Some(k) => format!("0 to {}", k.saturating_sub(1)),
                None => "0 or more".to_owned(),
            },
        }),
    }
}

/// Refuses a tensor whose name is not known.
pub(crate) fn check_names(
    file: &SafeTensors<'_>,
    known: impl Fn(&str) -> bool,
) -> Result<(), PromptFileError> {
    let names = file.names().into_iter();
    match names.filter(|name| !known(name)).min() {
        Some(name) => Err(PromptFileError::UnknownTensor {
            tensor: name.to_owned(),
        }),
        None => Ok(()),
    }
}

/// The tensors of one prompt in a file. Their names begin with `prefix`.
pub(crate) struct Tensors<'a> {
    pub file: &'a SafeTensors<'a>,
    pub prefix: &'a str,
}

impl Tensors<'_> {
    fn named(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    pub fn missing(&self, name: &str) -> PromptFileError {
        PromptFileError::MissingTensor(self.named(name))
    }

    fn shape(&self, name: &str, found: &[usize], expected: &str) -> PromptFileError {
        shape(&self.named(name), found, expected)
    }

    /// The prompt at the first block's input, [m, d].
    pub fn prompt(&self) -> Result<Option<Tensor<f32>>, PromptFileError> {
        let Some(mut prompt) = self.float(PROMPT)? else {
            return Ok(None);
        };
        if prompt.shape.len() == 3 && prompt.shape[0] == 1 {
            prompt.shape.remove(0);
        }
        match prompt.shape.as_slice() {
            [m, d] if (1..=MAX_TOKENS).contains(m) && (1..=MAX_EMBED_DIM).contains(d) => {
                Ok(Some(prompt))
            }
            [_, _] => {
                let expected =
                    format!("[m, d] with m in 1..={MAX_TOKENS}, d in 1..={MAX_EMBED_DIM}");
                Err(self.shape(PROMPT, &prompt.shape, &expected))
            }
            other => Err(self.shape(PROMPT, other, "[m, d]")),
        }
    }

    fn float(&self, name: &str) -> Result<Option<Tensor<f32>>, PromptFileError> {
        let name = self.named(name);
        let Ok(view) = self.file.tensor(&name) else {
            return Ok(None);
        };
        let values = read_f32(&view).ok_or_else(|| PromptFileError::Dtype {
            tensor: name.clone(),
            dtype: format!("{:?}", view.dtype()).to_lowercase(),
            expected: "f32, f16 or bf16",
        })?;
        match values.iter().position(|v| !v.is_finite()) {
            Some(index) => Err(PromptFileError::NotFinite {
                tensor: name,
                index,
                value: values[index],
            }),
            None => Ok(Some(Tensor::new(view.shape(), values))),
        }
    }

    pub fn head(&self, d: usize) -> Result<Option<Head>, PromptFileError> {
        let (weight, bias) = match (self.float("head.weight")?, self.float("head.bias")?) {
            (None, None) => return Ok(None),
            (Some(_), None) => return Err(self.missing("head.bias")),
            (None, Some(_)) => return Err(self.missing("head.weight")),
            (Some(weight), Some(bias)) => (weight, bias),
        };
        if weight.shape.len() != 2 || weight.shape[0] == 0 || weight.shape[1] != d {
            return Err(self.shape("head.weight", &weight.shape, &format!("[K, {d}]")));
        }
        if bias.shape != weight.shape[..1] {
            return Err(self.shape("head.bias", &bias.shape, &format!("[{}]", weight.shape[0])));
        }
        Ok(Some(Head { weight, bias }))
    }

    fn sketch(&self, d: usize) -> Result<Option<Sketch>, PromptFileError> {
        let labels = match self.file.tensor("sketch.labels") {
            Err(_) => None,
            Ok(view) => Some(Tensor::new(
                view.shape(),
                read_i64(&view).ok_or_else(|| PromptFileError::Dtype {
                    tensor: "sketch.labels".to_owned(),
                    dtype: format!("{:?}", view.dtype()).to_lowercase(),
                    expected: "i64",
                })?,
            )),
        };
        let (features, labels) = match (self.float("sketch.features")?, labels) {
            (None, None) => return Ok(None),
            (Some(_), None) => return Err(self.missing("sketch.labels")),
            (None, Some(_)) => return Err(self.missing("sketch.features")),
            (Some(features), Some(labels)) => (features, labels),
        };
        if features.shape.len() != 2 || features.shape[1] != d {
            return Err(self.shape("sketch.features", &features.shape, &format!("[n, {d}]")));
        }
        if labels.shape != features.shape[..1] {
            let expected = format!("[{}]", features.shape[0]);
            return Err(self.shape("sketch.labels", &labels.shape, &expected));
        }
        Ok(Some(Sketch { features, labels }))
    }
}

use serde_json::Value;

use super::*;
use crate::testing::prompt_file;

fn with(tensors: Vec<(&str, Stored)>) -> Result<PromptFile, PromptFileError> {
    PromptFile::parse(&serialize(tensors, None).unwrap())
}

fn zeros(shape: &[usize]) -> Stored {
    Stored::from(&Tensor::new(shape, vec![0f32; shape.iter().product()]))
}

#[test]
fn what_is_written_reads_back_and_the_bytes_are_the_same_each_time() {
    let mut file = prompt_file(3, 8, 1);
    file.head = Some(Head {
        weight: Tensor::new([2, 8], vec![0.5; 16]),
        bias: Tensor::new([2], vec![0.0, 1.0]),
    });
    file.sketch = Some(Sketch {
        features: Tensor::new([4, 8], vec![0.25; 32]),
        labels: Tensor::new([4], vec![0, 1, 0, 1]),
    });
    let bytes = file.to_bytes();
    assert_eq!(PromptFile::parse(&bytes).unwrap(), file);
    assert_eq!(file.to_bytes(), bytes);
}

#[test]
fn a_file_without_metadata_and_with_a_leading_axis_is_accepted() {
    let file = with(vec![("prompt_embeddings", zeros(&[1, 5, 8]))]).unwrap();
    assert_eq!(file.metadata, None);
    assert_eq!((file.num_tokens(), file.embed_dim()), (5, 8));
}

#[test]
fn a_bad_file_is_refused_and_the_tensor_is_named() {
    let refusal = |tensors| with(tensors).unwrap_err().to_string();
    assert_eq!(
        refusal(vec![
            ("prompt_embeddings", zeros(&[5, 8])),
            ("lora_A", zeros(&[1]))
        ]),
        "tensor `lora_A` is not part of a prompt file; leave it out"
    );
    assert_eq!(
        refusal(vec![("head.bias", zeros(&[2]))]),
        "tensor `prompt_embeddings` is missing"
    );
    assert_eq!(
        refusal(vec![("prompt_embeddings", zeros(&[8]))]),
        "tensor `prompt_embeddings` has shape [8], expected [m, d]"
    );
    let whole = Stored::from(&Tensor::new([1, 2], vec![1i64, 2]));
    assert_eq!(
        refusal(vec![("prompt_embeddings", whole)]),
        "tensor `prompt_embeddings` has dtype i64, expected f32, f16 or bf16"
    );
    let nan = Stored::from(&Tensor::new([1, 2], vec![1.0, f32::NAN]));
    assert_eq!(
        refusal(vec![("prompt_embeddings", nan)]),
        "tensor `prompt_embeddings` holds NaN at index 1; every value must be finite"
    );
    let narrow = vec![
        ("prompt_embeddings", zeros(&[5, 8])),
        ("head.weight", zeros(&[2, 7])),
        ("head.bias", zeros(&[2])),
    ];
    assert_eq!(
        refusal(narrow),
        "tensor `head.weight` has shape [2, 7], expected [K, 8]"
    );
}

#[test]
fn metadata_may_be_long_but_not_endless() {
    let with_record = |length: usize| {
        let mut file = prompt_file(2, 4, 1);
        let metadata = file.metadata.as_mut().unwrap();
        metadata.training = Some(Value::String("x".repeat(length)));
        PromptFile::parse(&file.to_bytes())
    };
    assert!(with_record(MAX_METADATA_BYTES - 1024).is_ok());
    let error = with_record(MAX_METADATA_BYTES).unwrap_err();
    assert_eq!(error.subject(), Some(METADATA_KEY));
    assert!(matches!(error, PromptFileError::MetadataTooLong(n) if n > MAX_METADATA_BYTES));
}

#[test]
fn other_formats_are_named_before_anything_is_parsed() {
    for (bytes, name) in [
        (&b"PK\x03\x04rest"[..], "zip"),
        (b"\x80\x04\x95rest....", "pickle"),
        (b"\x93NUMPY\x01\x00", "NumPy"),
    ] {
        match PromptFile::parse(bytes) {
            Err(PromptFileError::Foreign(format)) => assert!(format.name.contains(name)),
            other => panic!("{other:?}"),
        }
    }
    assert!(matches!(
        PromptFile::parse(b"plain text, long enough"),
        Err(PromptFileError::NotSafetensors(_))
    ));
    let mut long = u64::to_le_bytes(2 << 20).to_vec();
    long.extend(b"{\"prompt_embeddings\": ");
    assert!(matches!(
        PromptFile::parse(&long),
        Err(PromptFileError::HeaderTooLong)
    ));
}

#[test]
fn vpt_names_are_explained() {
    for (tensor, hint) in [
        (
            "enc.transformer.prompt_embeddings",
            "name it `prompt_embeddings`",
        ),
        ("deep_prompt", "name it `deep_prompt_embeddings`"),
        ("enc.transformer.prompt_proj.weight", "the product"),
        (
            "enc.transformer.encoder.layer.0.weight",
            "backbone's weights",
        ),
    ] {
        let error = with(vec![(tensor, zeros(&[1, 2, 8]))]).unwrap_err();
        assert!(error.to_string().contains(hint), "{error}");
    }
}

#[test]
fn vpt_deep_has_a_prompt_for_every_block_after_the_first() {
    let deep = |shape: &[usize]| {
        with(vec![
            ("prompt_embeddings", zeros(&[1, 5, 8])),
            ("deep_prompt_embeddings", zeros(shape)),
        ])
    };
    let file = deep(&[11, 5, 8]).unwrap();
    assert_eq!(file.deep_prompt_embeddings.unwrap().shape, [11, 5, 8]);
    for shape in [&[11, 4, 8][..], &[11, 5, 7], &[0, 5, 8], &[5, 8]] {
        let error = deep(shape).unwrap_err();
        assert_eq!(error.subject(), Some("deep_prompt_embeddings"), "{error}");
        assert!(error.to_string().contains("[L-1, 5, 8]"), "{error}");
    }
}

#[test]
fn classes_head_and_sketch_speak_of_the_same_classes() {
    let mut file = prompt_file(2, 4, 1);
    let head = |k: usize| Head {
        weight: Tensor::new([k, 4], vec![0.5; 4 * k]),
        bias: Tensor::new([k], vec![0.0; k]),
    };
    let sketch = |labels: [i64; 2]| Sketch {
        features: Tensor::new([2, 4], vec![0.25; 8]),
        labels: Tensor::new([2], labels.to_vec()),
    };
    file.head = Some(head(3));
    let error = PromptFile::parse(&file.to_bytes()).unwrap_err();
    assert!(error.to_string().contains("K = 2"), "{error}");
    file.head = Some(head(2));
    for (labels, good) in [([0, 1], true), ([0, 2], false), ([-1, 0], false)] {
        file.sketch = Some(sketch(labels));
        let read = PromptFile::parse(&file.to_bytes());
        assert_eq!(read.is_ok(), good, "{read:?}");
    }
}

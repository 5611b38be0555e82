//! Tests on checkpoints that the libraries themselves wrote (scripts/reference/checkpoints.py).

use std::collections::BTreeMap;

use safetensors::SafeTensors;
use tempfile::TempDir;

use super::*;
use promptweave_domain::backbone::{Filter, Preprocessing};
use promptweave_domain::tensor::{Stored, Tensor, read_f32};

const LIMIT: u64 = 1 << 30;

fn fixture(name: &str) -> PathBuf {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/checkpoints");
    fixtures.join(name)
}

/// The settings that none of the fixtures' tensors contain.
fn given() -> Settings {
    Settings {
        num_heads: Some(2),
        preprocessing: Some(Preprocessing {
            size: 8,
            filter: Filter::Bicubic,
            antialias: true,
            mean: [0.5; 3],
            std: [0.5; 3],
        }),
        ..Settings::default()
    }
}

fn imported(name: &str, given: Settings) -> (TempDir, Imported) {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::in_folder(&fixture(name)).unwrap();
    let imported = import(&checkpoint, given, LIMIT, dir.path()).unwrap();
    (dir, imported)
}

fn tensors(dir: &Path) -> BTreeMap<String, Vec<f32>> {
    let bytes = fs::read(dir.join(MODEL_FILE)).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let values = |view| read_f32(&view).unwrap();
    file.tensors()
        .into_iter()
        .map(|(name, view)| (name, values(view)))
        .collect()
}

#[test]
fn one_model_is_one_backbone_whoever_wrote_it() {
    for (scaled, files) in [
        (
            false,
            [
                ("timm", Naming::Timm, vec!["head.bias", "head.weight"]),
                (
                    "hf_vit",
                    Naming::HfVit,
                    vec!["classifier.bias", "classifier.weight"],
                ),
                ("google", Naming::Google, vec!["head/bias", "head/kernel"]),
            ],
        ),
        (
            true,
            [
                (
                    "timm_scaled",
                    Naming::Timm,
                    vec!["head.bias", "head.weight"],
                ),
                ("hf_dinov2", Naming::HfDinov2, vec!["embeddings.mask_token"]),
                ("dinov2", Naming::Dinov2, vec!["mask_token"]),
            ],
        ),
    ] {
        let (reference, first) = imported(files[0].0, given());
        let reference = tensors(reference.path());
        assert_eq!(reference.contains_key("blocks.1.ls2.gamma"), scaled);
        for (name, naming, left_out) in files {
            let (dir, made) = imported(name, given());
            assert_eq!(
                (made.naming, made.left_out),
                (naming, left_out.iter().map(|s| s.to_string()).collect())
            );
            assert_eq!(made.backbone.digest, first.backbone.digest, "{name}");
            assert_eq!(tensors(dir.path()), reference, "{name}");
            let config = made.backbone.config;
            assert_eq!(
                (config.embed_dim, config.depth, config.num_heads),
                (16, 2, 2)
            );
            assert_eq!((config.patch_size, config.pos_grid), (4, 2));
            assert_eq!(config.norm_eps, 1e-6, "{name}");
        }
    }
}

#[test]
fn timm_writes_the_very_tensors_that_an_import_of_it_has() {
    let theirs = fs::read(fixture("timm/model.safetensors")).unwrap();
    let theirs = SafeTensors::deserialize(&theirs).unwrap();
    let (dir, _) = imported("google", given());
    for (name, values) in tensors(dir.path()) {
        assert_eq!(
            read_f32(&theirs.tensor(&name).unwrap()).unwrap(),
            values,
            "{name}"
        );
    }
}

#[test]
fn files_beside_a_checkpoint_say_what_its_tensors_do_not() {
    // transformers' files contain all settings.
    let (_dir, made) = imported("hf_vit", Settings::default());
    let config = made.backbone.config;
    assert_eq!(config.num_heads, 2);
    assert_eq!(config.preprocessing, given().preprocessing.unwrap());
    // timm's files do not contain the heads, unless the architecture is a published one.
    let checkpoint = Checkpoint::in_folder(&fixture("timm")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let error = import(&checkpoint, Settings::default(), LIMIT, dir.path()).unwrap_err();
    assert!(matches!(
        error,
        ImportError::MissingSetting {
            setting: "num_heads"
        }
    ));
    let heads = Settings {
        num_heads: Some(4),
        ..Settings::default()
    };
    let (_dir, made) = imported("timm", heads);
    let config = made.backbone.config;
    assert_eq!(
        (config.architecture.as_str(), config.num_heads),
        ("vit_tiny_patch4_8", 4)
    );
    assert_eq!(config.preprocessing, given().preprocessing.unwrap());
    let base = serde_json::json!({"architecture": "vit_base_patch16_224", "num_features": 768});
    let told = Settings::of_files(&base, &Value::Null).unwrap();
    assert_eq!(told.num_heads, Some(12));
    // The .npz has the heads in its shapes, and no file beside it.
    let mut few = given();
    few.num_heads = None;
    assert_eq!(imported("google", few).1.backbone.config.num_heads, 2);
    let error = Settings::of_files(
        &serde_json::json!({"hidden_act": "quick_gelu"}),
        &Value::Null,
    );
    assert!(matches!(
        error,
        Err(ImportError::Unsupported {
            setting: "hidden_act",
            ..
        })
    ));
}

/// Writes a checkpoint again with its tensors changed.
fn changed(
    name: &str,
    change: impl FnOnce(&mut BTreeMap<String, Tensor<f32>>),
) -> Result<Imported, ImportError> {
    let dir = tempfile::tempdir().unwrap();
    let bytes = fs::read(fixture(name).join(MODEL_FILE)).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors = file
        .tensors()
        .into_iter()
        .map(|(name, view)| {
            let values = read_f32(&view).unwrap();
            (name, Tensor::new(view.shape(), values))
        })
        .collect();
    change(&mut tensors);
    let stored = tensors.iter().map(|(name, t)| (name, Stored::from(t)));
    let path = dir.path().join("changed.safetensors");
    fs::write(&path, safetensors::serialize(stored, None).unwrap()).unwrap();
    let out = dir.path().join("out");
    fs::create_dir(&out).unwrap();
    import(&Checkpoint::beside(path), given(), LIMIT, &out)
}

#[test]
fn a_tensor_at_fault_is_named_as_its_file_names_it() {
    let key = "vit.encoder.layer.1.attention.attention.key.weight";
    let missing = changed("hf_vit", |t| drop(t.remove(key))).unwrap_err();
    assert_eq!(missing.to_string(), format!("tensor `{key}` is missing"));
    let shape = changed("hf_vit", |t| {
        t.insert(key.into(), Tensor::new([16, 8], vec![0.0; 128]));
    });
    assert_eq!(
        shape.unwrap_err().to_string(),
        format!("tensor `{key}` has shape [16, 8], expected [16, 16]")
    );
    let extra = changed("hf_dinov2", |t| {
        let tokens = Tensor::new([1, 4, 16], vec![0.0; 64]);
        t.insert("embeddings.register_tokens".into(), tokens);
    });
    assert_eq!(
        extra.unwrap_err().to_string(),
        "tensor `embeddings.register_tokens` is not part of this architecture"
    );
    let infinite = changed("timm", |t| {
        t.get_mut("blocks.0.norm1.bias").unwrap().values[3] = f32::INFINITY;
    });
    assert_eq!(
        infinite.unwrap_err().to_string(),
        "tensor `blocks.0.norm1.bias` holds inf; every value must be finite"
    );
    let hole = changed("timm", |t| {
        *t = std::mem::take(t)
            .into_iter()
            .map(|(name, tensor)| (name.replace("blocks.1.", "blocks.2."), tensor))
            .collect();
    });
    assert_eq!(
        hole.unwrap_err().to_string(),
        "tensor `blocks.1.attn.proj.bias` is missing"
    );
    let text = changed("timm", |t| {
        *t = BTreeMap::from([("text.proj".into(), Tensor::new([1], vec![0.0]))]);
    });
    assert!(matches!(text, Err(ImportError::UnknownNaming(found)) if found == "`text.proj`"));
    let no_class_token = changed("timm", |t| {
        t.insert("pos_embed".into(), Tensor::new([1, 4, 16], vec![0.0; 64]));
    });
    assert!(
        matches!(no_class_token, Err(ImportError::Layout { tensor, .. }) if tensor == "pos_embed")
    );
}

#[test]
fn more_weights_than_allowed_are_refused_before_they_are_written() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::in_folder(&fixture("timm")).unwrap();
    let error = import(&checkpoint, given(), 1000, dir.path()).unwrap_err();
    assert!(matches!(error, ImportError::TooLarge { limit: 1000, .. }));
    assert!(!dir.path().join(MODEL_FILE).exists());
}

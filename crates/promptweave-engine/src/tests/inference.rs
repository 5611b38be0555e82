//! Predictions against those of timm and transformers. `scripts/test_inference.py --write-fixtures` ran the snippets of
//! docs/guide/inference.md with both, on the files in tests/fixtures/inference, and kept what they predicted.

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

use promptweave_domain::digest::Digest;
use promptweave_domain::prediction::Model;
use tch::Device;

use crate::Engine;
use crate::predict::Predictor;
use crate::samples::Samples;

#[test]
fn pytorch_predicts_the_same_from_the_same_files() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/inference");
    let expected = fs::read(dir.join("log_p.json")).unwrap();
    // log p of every image and class, by model.
    let expected: BTreeMap<String, Vec<Vec<f64>>> = serde_json::from_slice(&expected).unwrap();
    assert_eq!(expected.keys().collect::<Vec<_>>(), ["ensemble", "prompt"]);
    let mut engine = Engine::new(Device::Cpu);
    let (backbone, vit) = engine.backbone(&dir.join("backbone")).unwrap();
    let paths = (0..4).map(|i| dir.join(format!("images/{i}.png")));
    let images = Samples::unlabelled(paths.collect(), false, &backbone.config.preprocessing);
    let images = images.unwrap();
    for (name, expected) in expected {
        let bytes = fs::read(dir.join(format!("models/{name}.safetensors"))).unwrap();
        let model = Model::parse(&bytes).unwrap();
        let classes = model.check(&name, Digest::of(&bytes), &backbone.facts());
        assert_eq!(classes.unwrap(), ["ant", "bee", "cat"]);
        let predictor = Predictor::of(&model, vit).unwrap().unwrap();
        let found = predictor.log_probabilities(vit, &images, |_| ControlFlow::Continue(()));
        let found = Vec::<f64>::try_from(found.unwrap().flatten(0, -1)).unwrap();
        let expected = expected.concat();
        assert_eq!(found.len(), expected.len());
        for (ours, theirs) in found.iter().zip(&expected) {
            let difference = (ours - theirs).abs() / theirs.abs().max(1e-3);
            assert!(difference < 1e-3, "{name}: {ours} {theirs}");
        }
    }
}

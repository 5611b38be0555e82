//! Tests that each method follows its definition, and nothing else.

use std::collections::BTreeMap;

use safetensors::SafeTensors;

use super::*;
use crate::tune::targets::Targets;
use crate::tune::tests::{Problem, go_on, options, problem, source};
use crate::vit::Weights;
use promptweave_domain::tensor::read_f32;
use promptweave_domain::tuning::NoCheckpoints;

fn by(method: &str) -> TuningOptions {
    TuningOptions {
        method: method.parse().unwrap(),
        prompt_learning_rate: 1e-2,
        ..options()
    }
}

fn alive() -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn train<'a>(tuning: &Tuning<'a>) -> Trained<'a> {
    tuning.train(&mut NoCheckpoints, &mut go_on).unwrap()
}

fn tensors(bytes: &[u8]) -> BTreeMap<String, Vec<f32>> {
    let file = SafeTensors::deserialize(bytes).unwrap();
    let all = file.tensors().into_iter();
    all.map(|(name, view)| (name, read_f32(&view).unwrap()))
        .collect()
}

/// Names of the tensors that differ from the backbone's own, and of those that it does not have.
/// The head's are left out.
fn changed(problem: &Problem, method: &str) -> (Vec<String>, Vec<String>) {
    let options = by(method);
    let stored = tensors(&train(&problem.tuning(&options)).adaptation().unwrap());
    let mut own = BTreeMap::new();
    let mut weights = Weights::load(&problem.backbone, Device::Cpu, Kind::Float).unwrap();
    weights.each(&mut |name, tensor| {
        own.insert(name.to_owned(), plain(tensor).unwrap());
    });
    let beside_head = stored
        .into_iter()
        .filter(|(name, _)| !name.starts_with("head."));
    let (mut there, mut added) = (Vec::new(), Vec::new());
    for (name, values) in beside_head {
        match own.get(&name) {
            Some(before) => {
                assert_ne!(*before, values, "{name} did not move");
                there.push(name);
            }
            None => added.push(name),
        }
    }
    (there, added)
}

#[test]
fn every_method_trains_its_own_tensors_and_no_others() {
    let problem = problem();
    let depth = problem.vit.config.depth;
    let all = changed(&problem, "full").0;
    let (biases, none) = changed(&problem, "bias");
    assert!(none.is_empty());
    let expected: Vec<&String> = all.iter().filter(|name| name.ends_with(".bias")).collect();
    assert_eq!(biases.iter().collect::<Vec<_>>(), expected);

    let (last, _) = changed(&problem, "partial-1");
    let of_last = format!("blocks.{}.", depth - 1);
    let expected: Vec<&String> = all
        .iter()
        .filter(|name| name.starts_with(&of_last) || name.starts_with("norm."))
        .collect();
    assert_eq!(last.iter().collect::<Vec<_>>(), expected);

    let (there, added) = changed(&problem, "adapter-4");
    assert!(there.is_empty());
    assert_eq!(added.len(), 4 * depth);
    let (there, added) = changed(&problem, "sidetune");
    assert!(there.is_empty() && added.contains(&"side.mix".to_owned()));
    assert_eq!(changed(&problem, "linear"), (vec![], vec![]));
    assert_eq!(changed(&problem, "mlp-2"), (vec![], vec![]));
}

#[test]
fn every_method_lowers_the_loss_and_tells_the_classes_of_new_images() {
    let problem = problem();
    for method in [
        "vpt-deep",
        "linear",
        "mlp-2",
        "partial-1",
        "bias",
        "adapter-4",
        "sidetune",
        "full",
    ] {
        let options = TuningOptions {
            epochs: 8,
            ..by(method)
        };
        let tuned = train(&problem.tuning(&options));
        let losses = &tuned.curves.cross_entropy;
        assert!(losses[7] < 0.8 * losses[0], "{method}: {losses:?}");
        let accuracy = tuned.score(&problem.test, &mut alive).unwrap().accuracy;
        assert!(accuracy > 0.5, "{method}: {accuracy}");
    }
}

/// With both projections at 0, as in VPT's code, neither would ever have a gradient.
#[test]
fn adapters_begin_as_the_identity_and_learn_in_both_their_weights() {
    let problem = problem();
    let options = by("adapter-4");
    let tuning = problem.tuning(&options);
    let model = FullModel::new(tuning).unwrap();
    let initial = model.initial().unwrap();
    let names: Vec<&str> = initial.iter().map(|p| p.name.as_str()).collect();
    let mut parameters: Vec<Tensor> = initial.iter().map(|p| p.values.copy()).collect();
    let linear = by("linear");
    let plain = Heads::new(problem.tuning(&linear)).unwrap();
    let apart = model
        .features(&problem.test, &parameters, &mut alive)
        .unwrap()
        - plain.features(&problem.test, &[], &mut alive).unwrap();
    assert!(f64::try_from(apart.abs().max()).unwrap() < 1e-4);

    // The head tells the classes apart.
    let head = parameters.len() - 2;
    parameters[head] = Tensor::randn_like(&parameters[head]);
    let rows: Vec<usize> = (0..problem.train.len()).collect();
    let size = |tensor: &Tensor| f64::try_from(tensor.abs().max()).unwrap();
    let gradients = model.gradients(&rows, &parameters, 0).unwrap().1;
    for (at, name) in names.iter().enumerate() {
        if name.ends_with("up.weight") {
            assert!(size(&gradients[at]) > 0.0, "{name}");
            parameters[at] = &parameters[at] - &gradients[at] * 0.1;
        }
    }
    let gradients = model.gradients(&rows, &parameters, 1).unwrap().1;
    for (at, name) in names.iter().enumerate() {
        if name.starts_with("adapters.") && name.ends_with("weight") {
            assert!(size(&gradients[at]) > 0.0, "{name}");
        }
    }
}

#[test]
fn a_deep_prompt_is_a_file_that_begins_a_tuning_again() {
    let problem = problem();
    let options = by("vpt-deep");
    let tuning = problem.tuning(&options);
    let file = train(&tuning).prompt_file(&mut alive).unwrap();
    let deep = file.deep_prompt_embeddings.as_ref().unwrap();
    let depth = problem.vit.config.depth;
    assert_eq!(deep.shape, [depth - 1, 3, file.embed_dim()]);
    assert_eq!(PromptFile::parse(&file.to_bytes()).unwrap(), file);
    let standing = TuningOptions {
        prompt_learning_rate: 0.0,
        head_learning_rate: 0.0,
        epochs: 1,
        ..options.clone()
    };
    let start = source(&file);
    let again = Tuning {
        start: Some(&start),
        options: &standing,
        ..tuning
    };
    let again = train(&again).prompt_file(&mut alive).unwrap();
    assert_eq!(again.deep_prompt_embeddings, file.deep_prompt_embeddings);
    assert_eq!(again.head, file.head);
    // Without its own tokens in later blocks, a prompt gives other features.
    let shallow = TuningOptions {
        method: TuningMethod::VptShallow,
        ..options.clone()
    };
    let none = train(&problem.tuning(&shallow))
        .prompt_file(&mut alive)
        .unwrap();
    assert!(none.deep_prompt_embeddings.is_none());
    let linear = by("linear");
    let refused = train(&problem.tuning(&linear)).prompt_file(&mut alive);
    assert!(matches!(refused, Err(EngineError::MakesNoPrompt(_))));
}

/// Compares the fast way with the definition, by automatic differentiation of the whole network
/// with a prompt in it.
#[test]
fn shallow_gradients_are_those_of_the_whole_network() {
    let problem = problem();
    let options = TuningOptions {
        distillation_weight: 0.3,
        ..options()
    };
    let teacher = train(&problem.tuning(&crate::tune::tests::options()))
        .prompt_file(&mut alive)
        .unwrap();
    let teachers = [source(&teacher)];
    let tuning = Tuning {
        teachers: &teachers,
        ..problem.tuning(&options)
    };
    let model = Shallow::new(tuning).unwrap();
    let mut parameters: Vec<Tensor> = model
        .initial()
        .unwrap()
        .into_iter()
        .map(|p| p.values)
        .collect();
    parameters[1] =
        Tensor::from_slice(&[0.3f32, -0.2, 0.1]).view([3, 1]) * Tensor::ones_like(&parameters[1]);
    let rows = [3, 0, 7, 11];
    let (sum, gradients) = model.gradients(&rows, &parameters, 0).unwrap();

    let weights = Weights::load(&problem.backbone, Device::Cpu, Kind::Float).unwrap();
    let leaves: Vec<Tensor> = (parameters.iter())
        .map(|p| p.copy().set_requires_grad(true))
        .collect();
    let images = problem
        .train
        .images(&rows, Device::Cpu, Kind::Float)
        .unwrap();
    let copies = leaves[0].expand([4, -1, -1], false);
    let features = weights.features(&weights.embedding.tokens(&images), &copies);
    let logits = features.linear(&leaves[1], Some(&leaves[2]));
    let loss = Targets::of(&tuning).unwrap().loss(&rows, &logits);
    assert!((f64::try_from(&loss).unwrap() - sum).abs() < 1e-4 * sum.abs());
    let expected = Tensor::run_backward(&[loss / 4.0], &leaves, false, false);
    for (found, expected) in gradients.iter().zip(expected) {
        let apart = f64::try_from((found - &expected).abs().max()).unwrap();
        let size = f64::try_from(expected.abs().max()).unwrap();
        assert!(apart < 1e-3 * size, "{apart} {size}");
    }
}

#[test]
fn a_student_comes_to_its_teachers_logits() {
    let problem = problem();
    let teacher = train(&problem.tuning(&options()))
        .prompt_file(&mut alive)
        .unwrap();
    let teachers = [source(&teacher)];
    let all: Vec<usize> = (0..problem.train.len()).collect();
    // The mean squared difference from the teacher's logits, by a loss that contains nothing else.
    let apart = |weight: f64| {
        let taught = TuningOptions {
            distillation_weight: weight,
            epochs: 20,
            head_learning_rate: 1.0,
            ..options()
        };
        let tuning = Tuning {
            teachers: &teachers,
            ..problem.tuning(&taught)
        };
        let tuned = train(&tuning);
        let features = tuned
            .model
            .features(&problem.train, &tuned.parameters, &mut alive)
            .unwrap();
        let logits = features.linear(&tuned.parameters[1], Some(&tuned.parameters[2]));
        let only = |weight: f64| {
            let options = TuningOptions {
                distillation_weight: weight,
                ..taught.clone()
            };
            let tuning = Tuning {
                options: &options,
                ..tuning
            };
            f64::try_from(Targets::of(&tuning).unwrap().loss(&all, &logits)).unwrap()
        };
        (only(1.0) - only(0.0)) / all.len() as f64
    };
    let (without, with) = (apart(0.0), apart(10.0));
    assert!(with < 0.5 * without, "{with} {without}");
}

#[test]
fn attention_sums_to_one_for_every_sample_and_all_of_it_learns() {
    let problem = problem();
    let of = |seed: u64| {
        let d = problem.vit.config.embed_dim;
        let values = initial_prompt(3, d, problem.vit.config.patch_size, seed);
        // Values large enough that attention prefers some sources.
        PlainTensor::new(
            [3, d],
            values.iter().map(|v| 300.0 * v).collect::<Vec<f32>>(),
        )
    };
    let sources = [of(1), of(2), of(3)];
    let options = options();
    let tuning = problem.tuning(&options);
    let model = Attention::new(tuning, &sources).unwrap();
    let initial = model.initial().unwrap();
    let mut parameters: Vec<Tensor> = initial.iter().map(|p| p.values.copy()).collect();
    let attention = model.of_samples(&problem.train, &parameters).unwrap();
    assert_eq!(attention.size(), [problem.train.len() as i64, 4]);
    let off = attention.sum_dim_intlist(-1, false, Kind::Float) - 1.0;
    assert!(f64::try_from(off.abs().max()).unwrap() < 1e-5);
    assert!(bool::try_from(attention.ge(0.0).all()).unwrap());
    let spread = attention.std_dim([0i64].as_slice(), true, false);
    assert!(
        f64::try_from(spread.max()).unwrap() > 1e-3,
        "every sample has its own"
    );

    let head = parameters.len() - 2;
    parameters[head] = Tensor::randn_like(&parameters[head]);
    let rows: Vec<usize> = (0..problem.train.len()).collect();
    let (_, gradients) = model.gradients(&rows, &parameters, 0).unwrap();
    for (parameter, gradient) in initial.iter().zip(gradients) {
        let size = f64::try_from(gradient.abs().max()).unwrap();
        assert!(size > 0.0, "{}", parameter.name);
    }
    let mean = model.learn(&mut go_on).unwrap();
    assert!(mean.len() == 3 && mean.iter().all(|a| *a > 0.0) && mean.iter().sum::<f64>() < 1.0);
}

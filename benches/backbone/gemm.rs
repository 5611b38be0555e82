//! The rate of the matrix library at the shapes of a backbone's four linear maps, which is promptweave's yardstick.

use std::path::PathBuf;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use promptweave_domain::backbone::BackboneConfig;
use promptweave_formats::backbone::Backbone;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

/// How long one shape is repeated, and how often that is tried; the best try counts.
const SLICE: Duration = Duration::from_millis(25);
const TRIES: usize = 3;

#[derive(clap::Args)]
pub struct Args {
    #[arg(long)]
    backbone: PathBuf,
    /// Number of prompt tokens.
    #[arg(long, default_value_t = 10)]
    tokens: usize,
    /// Samples in a micro-batch; if several are given, the best one is reported.
    #[arg(long, value_delimiter = ',', required = true)]
    batch: Vec<usize>,
}

/// Measures GFLOP/s in f32 and bf16: on one thread, on all threads in one product, and on all threads with one product
/// each.
pub fn measure(args: &Args) -> anyhow::Result<Value> {
    let config = Backbone::open(&args.backbone)?.config;
    let all = tch::get_num_threads();
    let best = |kind, streams| {
        let rates = args.batch.iter().map(|batch| {
            let rows = batch * config_tokens(&config, args.tokens);
            let (rate, forward, backward) = rate(&config, rows as i64, kind, streams);
            (
                rate,
                json!({"gflops": rate, "forward": forward, "backward": backward, "batch": batch}),
            )
        });
        rates.max_by(|a, b| a.0.total_cmp(&b.0)).map(|best| best.1)
    };
    let mut line = serde_json::Map::new();
    for (name, kind) in [("f32", Kind::Float), ("bf16", Kind::BFloat16)] {
        tch::set_num_threads(all);
        let wide = best(kind, 1);
        tch::set_num_threads(1);
        let modes =
            json!({"one_thread": best(kind, 1), "wide": wide, "narrow": best(kind, all as usize)});
        line.insert(name.to_owned(), modes);
    }
    line.insert("threads".to_owned(), json!(all));
    Ok(Value::Object(line))
}

/// n, the number of tokens: CLS, prompt and patches.
fn config_tokens(config: &BackboneConfig, prompt_tokens: usize) -> usize {
    1 + prompt_tokens + (config.preprocessing.size / config.patch_size).pow(2)
}

/// The rate of a job, which has two forward passes for one backward pass, and of each pass alone.
fn rate(config: &BackboneConfig, rows: i64, kind: Kind, streams: usize) -> (f64, f64, f64) {
    let d = config.embed_dim as i64;
    let maps = [(d, 3 * d), (d, d), (d, 4 * d), (4 * d, d)];
    let (mut operations, mut forward, mut backward) = (0.0, 0.0, 0.0);
    for (inputs, outputs) in maps {
        operations += (2 * rows * inputs * outputs) as f64;
        let on = (kind, Device::Cpu);
        let time = |backward: bool| {
            let made = || {
                let x = Tensor::randn([rows, if backward { outputs } else { inputs }], on);
                (x, Tensor::randn([outputs, inputs], on))
            };
            // This is not a product of autograd's: it computes a layer's gradient, dX = dY W.
            best_time(streams, made, |(x, weight)| {
                if backward {
                    x.matmul(weight)
                } else {
                    x.linear(weight, None::<Tensor>)
                }
            })
        };
        forward += time(false);
        backward += time(true);
    }
    let gflops = |operations: f64, seconds: f64| operations / seconds * 1e-9;
    (
        gflops(3.0 * operations, 2.0 * forward + backward),
        gflops(operations, forward),
        gflops(operations, backward),
    )
}

/// Seconds per call, with `streams` threads calling at once, each on its own `made`: the total time over all calls.
fn best_time<T>(
    streams: usize,
    made: impl Fn() -> T + Sync,
    call: impl Fn(&T) -> Tensor + Sync,
) -> f64 {
    let barrier = Barrier::new(streams);
    let threads = tch::get_num_threads();
    let calls_a_second = || {
        // MKL asks the calling thread for its number of threads, and this one is new.
        tch::set_num_threads(threads);
        let own = made();
        let _no_grad = tch::no_grad_guard();
        let start = Instant::now();
        drop((call(&own), call(&own)));
        let calls = (2.0 * SLICE.as_secs_f64() / start.elapsed().as_secs_f64()).ceil();
        let calls = calls.clamp(1.0, 1000.0);
        [(); TRIES].map(|()| {
            barrier.wait();
            let start = Instant::now();
            for _ in 0..calls as usize {
                drop(call(&own));
            }
            calls / start.elapsed().as_secs_f64()
        })
    };
    let rates: Vec<[f64; TRIES]> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..streams).map(|_| scope.spawn(calls_a_second)).collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, _>| thread.join();
        let joined = threads.into_iter().map(join);
        joined
            .map(|rates| rates.expect("it does not panic"))
            .collect()
    });
    // The rates of threads that work side by side add up, try by try.
    let tries = (0..TRIES).map(|i| rates.iter().map(|rates| rates[i]).sum::<f64>());
    1.0 / tries.fold(0.0, f64::max)
}

//! `promptweave plot`: draws a result as two pictures, `weights.svg` and `pareto_path.svg`.
//!
//! It reads the JSON of `promptweave compose` and of `GET /v1/ensembles/{id}/result`.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use promptweave_domain::composition::{CompositionResult, PathPoint};
use promptweave_domain::method::Method;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Okabe and Ito's colours, which colour-blind people can tell apart; sources beyond eight share them.
pub const PALETTE: [RGBColor; 8] = [
    RGBColor(0, 114, 178),
    RGBColor(230, 159, 0),
    RGBColor(0, 158, 115),
    RGBColor(213, 94, 0),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(90, 90, 90),
    RGBColor(240, 228, 66),
];
pub const INK: RGBColor = RGBColor(40, 40, 40);
pub const GRID: RGBColor = RGBColor(225, 225, 225);
pub const GREY: RGBColor = RGBColor(120, 120, 120);

/// Reads `result`, writes its pictures into `out` and returns their paths. A result without a path of trade-offs has no
/// second picture.
pub fn plot(result: &Path, out: &Path) -> Result<Vec<PathBuf>> {
    let json = fs::read(result).with_context(|| format!("cannot read `{}`", result.display()))?;
    let result: CompositionResult = serde_json::from_slice(&json)
        .with_context(|| format!("`{}` is not a composition's result", result.display()))?;
    fs::create_dir_all(out).with_context(|| format!("cannot make `{}`", out.display()))?;
    let write = |name: &str, svg: String| {
        let path = out.join(name);
        fs::write(&path, svg).with_context(|| format!("cannot write `{}`", path.display()))?;
        Ok::<_, anyhow::Error>(path)
    };
    let mut written = vec![write("weights.svg", weights_svg(&result)?)?];
    if !result.pareto_path.is_empty() {
        written.push(write("pareto_path.svg", path_svg(&result)?)?);
    }
    Ok(written)
}

/// One bar of the picture of weights.
struct Bar<'a> {
    name: &'a str,
    weight: f64,
    standard_error: Option<f64>,
    /// The score of the source alone.
    alone: Option<f64>,
}

/// The bars, and what `alone` is: the H-score, or with the method `pool` the cross-fitted loss. A pool has one more bar,
/// for the backbone without a prompt.
fn bars(result: &CompositionResult) -> (Vec<Bar<'_>>, &'static str) {
    let pool = (result.pool.as_ref()).filter(|_| result.method.name == Method::Pool);
    let mut bars: Vec<Bar<'_>> = (result.source_weights.iter().enumerate())
        .map(|(row, source)| Bar {
            name: &source.prompt,
            weight: source.weight,
            standard_error: source.standard_error,
            alone: match pool {
                Some(pool) => pool.weights.get(row).map(|it| it.validation_loss),
                None => (result.diagnostics.per_source.get(row)).map(|it| it.h_score),
            },
        })
        .collect();
    let none = pool.and_then(|pool| pool.no_transfer);
    bars.extend(none.map(|none| Bar {
        name: "no prompt",
        weight: none.weight,
        standard_error: Some(none.standard_error),
        alone: Some(none.validation_loss),
    }));
    let alone = match pool {
        Some(_) => "loss alone, in nats",
        None => "H-score alone",
    };
    (bars, alone)
}

/// Draws one bar per source: its weight αᵢ with its standard error, and beside it the score of that source alone.
fn weights_svg(result: &CompositionResult) -> Result<String> {
    const ROW: i32 = 30;
    const TOP: i32 = 56;
    const LEFT: i32 = 180;
    const FULL: i32 = 360;
    const RIGHT: i32 = 760;
    let (bars, alone) = bars(result);
    let rows = bars.len() as i32;
    let mut svg = String::new();
    {
        let size = (RIGHT as u32 + 10, (TOP + rows * ROW + 14) as u32);
        let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        area.fill(&WHITE)?;
        let write = |text: &str, x, y, size, color: &RGBColor, side| {
            area.draw_text(text, &style(size, color, side), (x, y))
        };
        let errors = bars.iter().any(|it| it.standard_error.is_some());
        let title = match errors {
            true => "weight of each source ± its standard error",
            false => "weight of each source",
        };
        write(title, LEFT, 18, 17, &INK, HPos::Left)?;
        write(alone, RIGHT, 40, 13, &INK, HPos::Right)?;
        for (row, source) in bars.iter().enumerate() {
            let y = TOP + row as i32 * ROW + ROW / 2;
            let end = LEFT + (source.weight * f64::from(FULL)).round() as i32;
            // A bar of weight 0 is drawn as a line, so that it is visible.
            let bar = [(LEFT, y - 9), (end.max(LEFT + 1), y + 9)];
            area.draw(&Rectangle::new(bar, color(row).filled()))?;
            let name = shortened(source.name, 24);
            write(&name, LEFT - 10, y, 14, &INK, HPos::Right)?;
            let mut weight = format!("{:.3}", source.weight);
            let mut label_at = end;
            if let Some(error) = source.standard_error {
                weight += &format!(" ± {error:.3}");
                let at =
                    |weight: f64| LEFT + (weight.clamp(0.0, 1.0) * f64::from(FULL)).round() as i32;
                let (low, high) = (at(source.weight - error), at(source.weight + error));
                area.draw(&PathElement::new(
                    [(low, y), (high, y)],
                    INK.stroke_width(1),
                ))?;
                for x in [low, high] {
                    area.draw(&PathElement::new(
                        [(x, y - 4), (x, y + 4)],
                        INK.stroke_width(1),
                    ))?;
                }
                label_at = label_at.max(high);
            }
            write(&weight, label_at + 8, y, 14, &INK, HPos::Left)?;
            if let Some(alone) = source.alone {
                write(&format!("{alone:.3}"), RIGHT, y, 14, &INK, HPos::Right)?;
            }
        }
        area.present()?;
    }
    Ok(svg)
}

/// Draws H against L_align along the path on the left, and the weights over t on the right.
fn path_svg(result: &CompositionResult) -> Result<String> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (1120, 430)).into_drawing_area();
        area.fill(&WHITE)?;
        let (front, rest) = area.split_horizontally(460);
        let (weights, legend) = rest.split_horizontally(480);
        draw_front(&front, result)?;
        draw_weights_over_t(&weights, result)?;
        draw_legend(&legend, result)?;
        area.present()?;
    }
    Ok(svg)
}

fn draw_front(area: &Area<'_>, result: &CompositionResult) -> Result<()> {
    let point = |p: &PathPoint| (p.gradient_alignment, p.h_score);
    let chosen = (
        result.objective.gradient_alignment.unwrap_or_default(),
        result.objective.h_score,
    );
    let all = || result.pareto_path.iter().map(point).chain([chosen]);
    let x_range = padded(all().map(|p| p.0));
    let y_range = padded(all().map(|p| p.1));
    let mut chart = ChartBuilder::on(area)
        .caption("H-score against gradient alignment", style_caption())
        .margin(12)
        .x_label_area_size(46)
        .y_label_area_size(64)
        .build_cartesian_2d(x_range.clone(), y_range.clone())?;
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .bold_line_style(GRID)
        .x_labels(5)
        .y_labels(6)
        .x_label_formatter(&|v| tick(*v, &x_range))
        .y_label_formatter(&|v| tick(*v, &y_range))
        .x_desc("L_align (lower is better)")
        .y_desc("H (higher is better)")
        .draw()?;
    let line = result.pareto_path.iter().map(point);
    chart.draw_series(LineSeries::new(line, GREY.stroke_width(1)))?;
    chart.draw_series(
        result
            .pareto_path
            .iter()
            .map(|p| Circle::new(point(p), 3, PALETTE[0].filled())),
    )?;
    chart.draw_series([Circle::new(chosen, 7, PALETTE[3].stroke_width(3))])?;
    // The labels at the ends show the direction of t; the ring marks the answer.
    let mut label = |text: String, at: (f64, f64), color: &RGBColor, up| {
        // Labels point towards the middle, so that none leaves the picture.
        let middle = (x_range.start + x_range.end) / 2.0;
        let (side, shift) = if at.0 > middle {
            (HPos::Right, -12)
        } else {
            (HPos::Left, 12)
        };
        let text = Text::new(text, (shift, up), style(13, color, side));
        chart.draw_series([EmptyElement::at(at) + text]).map(|_| ())
    };
    if let [first, .., last] = result.pareto_path.as_slice() {
        for end in [first, last] {
            label(
                format!("t = {}", number(end.trade_off)),
                point(end),
                &GREY,
                12,
            )?;
        }
    }
    let text = match result.objective.trade_off {
        Some(t) => format!("chosen, t = {}", number(t)),
        None => "chosen".to_owned(),
    };
    label(text, chosen, &PALETTE[3], 16)?;
    Ok(())
}

fn draw_weights_over_t(area: &Area<'_>, result: &CompositionResult) -> Result<()> {
    let mut chart = ChartBuilder::on(area)
        .caption("weights along the path", style_caption())
        .margin(12)
        .x_label_area_size(46)
        .y_label_area_size(56)
        .build_cartesian_2d(0.0..1.0, 0.0..1.0)?;
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .bold_line_style(GRID)
        .x_labels(6)
        .y_labels(6)
        .x_label_formatter(&|v| number(*v))
        .y_label_formatter(&|v| number(*v))
        .x_desc("t: 0 weighs H alone, 1 gradient alignment alone")
        .y_desc("weight")
        .draw()?;
    if let Some(t) = result.objective.trade_off {
        let chosen = [(t, 0.0), (t, 1.0)];
        chart.draw_series(DashedLineSeries::new(chosen, 5, 4, PALETTE[3].into()))?;
    }
    for row in 0..result.source_weights.len() {
        let line = result
            .pareto_path
            .iter()
            .filter_map(|p| Some((p.trade_off, *p.weights.get(row)?)));
        chart.draw_series(LineSeries::new(line, color(row).stroke_width(2)))?;
    }
    Ok(())
}

fn draw_legend(area: &Area<'_>, result: &CompositionResult) -> Result<()> {
    for (row, source) in result.source_weights.iter().enumerate() {
        let y = 50 + row as i32 * 22;
        let line = vec![(0, y), (20, y)];
        area.draw(&PathElement::new(line, color(row).stroke_width(3)))?;
        let name = shortened(&source.prompt, 20);
        area.draw_text(&name, &style(13, &INK, HPos::Left), (26, y))?;
    }
    Ok(())
}

pub fn color(row: usize) -> RGBColor {
    PALETTE[row % PALETTE.len()]
}

pub fn style<'a>(size: i32, color: &'a RGBColor, side: HPos) -> TextStyle<'a> {
    TextStyle::from(("sans-serif", size).into_font())
        .color(color)
        .pos(Pos::new(side, VPos::Center))
}

pub fn style_caption() -> TextStyle<'static> {
    TextStyle::from(("sans-serif", 17).into_font()).color(&INK)
}

/// The values' range with a margin on both sides. It is never empty, even if all values are equal or there are none.
pub fn padded(values: impl Iterator<Item = f64>) -> Range<f64> {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| {
        (low.min(v), high.max(v))
    });
    if low > high {
        return 0.0..1.0;
    }
    let margin = if high > low {
        0.08 * (high - low)
    } else {
        0.5 * high.abs().max(1e-12)
    };
    low - margin..high + margin
}

/// A position on an axis, with enough decimals to tell it from its neighbours.
pub fn tick(value: f64, axis: &Range<f64>) -> String {
    let step = (axis.end - axis.start) / 10.0;
    let decimals = (-step.log10().floor()).max(0.0) as usize;
    if decimals > 4 && axis.end.abs() < 1e-2 {
        return number(value);
    }
    format!("{value:.decimals$}")
}

/// The number with three significant digits and no trailing zeros.
fn number(value: f64) -> String {
    let size = value.abs();
    // Tick positions come from additions: a value this close to zero is zero.
    if size < 1e-12 {
        return "0".to_owned();
    }
    if !(1e-3..1e5).contains(&size) {
        let text = format!("{value:.2e}");
        let (digits, exponent) = text.split_once('e').expect("of this format");
        return format!("{}e{exponent}", without_trailing_zeros(digits));
    }
    let decimals = (2 - size.log10().floor() as i32).clamp(0, 5) as usize;
    without_trailing_zeros(&format!("{value:.decimals$}")).to_owned()
}

fn without_trailing_zeros(text: &str) -> &str {
    if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.')
    } else {
        text
    }
}

fn shortened(name: &str, most: usize) -> String {
    if name.chars().count() <= most {
        return name.to_owned();
    }
    name.chars().take(most - 1).chain(['…']).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A result with two sources and a path of three points; `trade_off` is null after a raw λ.
    fn result(trade_off: Option<f64>) -> serde_json::Value {
        let digest = format!("sha256:{}", "0".repeat(64));
        let weights = [[0.9, 0.1], [0.7, 0.3], [0.5, 0.5]];
        let path: Vec<_> = weights
            .iter()
            .enumerate()
            .map(|(i, w)| {
                let t = i as f64 / 2.0;
                json!({"trade_off": t, "alignment_weight": null, "h_score": 3.0 - t,
                       "gradient_alignment": 1e-5 * (2.0 - t), "weights": w})
            })
            .collect();
        let score = json!({"h_score": 2.4, "train_accuracy": 0.9, "eval_accuracy": 0.5});
        let source = |name: &str| {
            json!({"prompt": name, "h_score": 2.25, "head_temperature": 1.0, "head_loss": 1.5,
                   "gradient_rms": 0.1})
        };
        json!({
            "source_weights": [
                {"prompt": "emoji", "version": 1, "digest": digest, "weight": 0.7,
                 "standard_error": 0.125},
                {"prompt": "a-source-with-a-very-long-name", "version": 1, "digest": digest, "weight": 0.3},
            ],
            "objective": {"h_score": 2.5, "gradient_alignment": 1.5e-5, "alignment_weight": 2.0,
                          "trade_off": trade_off, "total": -2.49997},
            "pareto_path": path,
            "local_optima": [],
            "solver": {"starts": 1, "iterations": 1, "evaluations": 1, "stop_reason": "converged"},
            "diagnostics": {
                "num_samples": 100, "num_classes": 4, "skipped_images": 0, "head_folds": 1,
                "per_source": [source("emoji"), source("a-source-with-a-very-long-name")],
                "composed_score": score, "surrogate_gap": 0.0, "baselines": null,
            },
            "composed_prompt": {"prompt": null, "version": null, "digest": digest},
            "provenance": {"backbone_digest": digest, "preprocessing_id": "98-bicubic-imagenet",
                           "sample_digest": digest, "seed": 0, "device": "cpu", "num_threads": 1,
                           "libtorch": "2.11.0", "version": "0.1.0"},
            "warnings": [],
            "timings": {},
        })
    }

    #[test]
    fn a_pool_has_a_bar_for_the_backbone_without_a_prompt() {
        let mut pooled = result(None);
        let weight = |name: &str, loss: f64| json!({"prompt": name, "weight": 0.25, "standard_error": 0.1, "validation_loss": loss});
        pooled["method"] = json!({"name": "pool"});
        pooled["pool"] = json!({
            "weights": [weight("emoji", 1.5), weight("other", 1.75)], "sharpness": 1.0, "converged": true,
            "no_transfer": {"weight": 0.625, "standard_error": 0.05, "validation_loss": 2.125, "gain": 0.1,
                            "gain_standard_error": 0.05},
            "validation_loss": 1.25, "validation_accuracy": 0.5, "uniform_validation_loss": 1.375,
        });
        let svg = weights_svg(&serde_json::from_value(pooled).unwrap()).unwrap();
        for text in ["no prompt", "0.625 ± 0.050", "2.125", "1.500", "loss alone"] {
            assert!(svg.contains(text), "{text} in {svg}");
        }
    }

    #[test]
    fn both_pictures_show_the_result() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("result.json");
        fs::write(&file, result(Some(0.5)).to_string()).unwrap();
        let written = plot(&file, &folder.path().join("out")).unwrap();
        let [weights, path] = written.try_into().unwrap();
        let read = |path| fs::read_to_string(path).unwrap();
        let weights = read(weights);
        for text in [
            "emoji",
            "0.700 ± 0.125",
            "a-source-with-a-very-lo…",
            "0.300",
            "2.25",
        ] {
            assert!(weights.contains(text), "{text} in {weights}");
        }
        let path = read(path);
        for text in ["chosen, t = 0.5", "t = 1", "emoji"] {
            assert!(path.contains(text), "{text} in {path}");
        }
    }

    #[test]
    fn without_a_trade_off_and_without_a_path_there_is_still_a_picture() {
        let mut result = result(None);
        result["pareto_path"] = json!([]);
        let svg = path_svg(&serde_json::from_value(result).unwrap()).unwrap();
        assert!(svg.contains("chosen") && !svg.contains("chosen, t"));
    }

    #[test]
    fn another_file_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("other.json");
        fs::write(&file, "{}").unwrap();
        let error = plot(&file, folder.path()).unwrap_err().to_string();
        assert_eq!(
            error,
            format!("`{}` is not a composition's result", file.display())
        );
    }

    #[test]
    fn numbers_are_short() {
        for (value, text) in [
            (0.0, "0"),
            (0.5, "0.5"),
            (-0.25, "-0.25"),
            (12.0, "12"),
            (120.0, "120"),
            (8.6249, "8.62"),
            (1234.0, "1234"),
            (0.00004, "4e-5"),
            (-1.25e7, "-1.25e7"),
        ] {
            assert_eq!(number(value), text);
        }
    }

    #[test]
    fn neighbouring_ticks_differ() {
        assert_eq!(tick(14.1, &(14.083..14.142)), "14.100");
        assert_eq!(tick(14.11, &(14.083..14.142)), "14.110");
        assert_eq!(tick(50.0, &(-8.0..115.0)), "50");
        assert_eq!(tick(4e-6, &(1e-6..1e-5)), "4e-6");
    }

    #[test]
    fn a_range_is_never_empty() {
        for values in [vec![1.0], vec![0.0, 0.0], vec![-3.0, 4.0]] {
            let range = padded(values.iter().copied());
            assert!(range.start < range.end);
            assert!(values.iter().all(|v| range.contains(v)));
        }
    }
}

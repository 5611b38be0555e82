//! A picture of the effect of prompts on the features of images: t-SNE of each target's test
//! images, under the initial prompt and under the one that HGPrompt composes of all sources, for
//! one seed. A layout is kept in its file and not computed again.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use plotters::prelude::*;
use plotters::style::text_anchor::HPos;
use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::{Rng as _, SeedableRng as _};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::reproduce::cells::{Cell, HGPROMPT};
use crate::reproduce::plots::{Area, color_of, draw};
use crate::reproduce::runner::Runner;
use crate::reproduce::suite::Suite;
use crate::reproduce::tsne::{Point, embed, squared_distance};
use crate::reproduce::{Args, Settings};
use promptweave::offline::progress::bar;
use promptweave::offline::write_whole;
use promptweave::plot::{GREY, GRID, INK, padded, style};

/// The most test images of a target: as many dots as can be told apart.
const MOST: usize = 200;

#[derive(Serialize, Deserialize)]
pub struct Layout {
    target: String,
    /// The images' labels, in the order of the points.
    labels: Vec<usize>,
    /// The points under the initial prompt.
    initial: Vec<Point>,
    /// The points under the composed prompt.
    composed: Vec<Point>,
}

fn path(out: &Path, target: &str, seed: u64) -> PathBuf {
    out.join("tsne").join(format!("{target}-{seed}.json"))
}

/// Reads the layouts that exist.
pub fn read(out: &Path, suite: &Suite, seed: u64) -> Result<Vec<Layout>> {
    let paths = suite.tasks.iter().map(|task| path(out, &task.name, seed));
    let there = paths.filter(|path| path.exists());
    let read = |path: PathBuf| {
        let named = || format!("cannot use `{}`", path.display());
        serde_json::from_slice(&fs::read(&path).with_context(named)?).with_context(named)
    };
    there.map(read).collect()
}

/// Makes the layouts that are missing.
pub fn compute(args: &Args, suite: &Suite, settings: &Settings, seed: u64) -> Result<()> {
    let is_missing = |target: &&str| !path(&args.out, target, seed).exists();
    let targets = suite.targets.iter().map(String::as_str);
    let missing: Vec<&str> = targets.filter(is_missing).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let mut runner = Runner::new(args, suite, settings)?;
    let bar = bar("t-SNE", missing.len() as u64);
    for target in missing {
        let cell = Cell {
            seed,
            target: target.to_owned(),
            method: HGPROMPT,
            sources: suite.others(target),
        };
        let (features, labels) = runner
            .test_features(&cell, MOST)
            .with_context(|| cell.to_string())?;
        let start = random(labels.len(), seed);
        let initial = embed(&rows(&features.get(0))?, &start);
        // It starts from the images' previous points, so that one sees what moved.
        let composed = embed(&rows(&features.get(1))?, &initial);
        let layout = Layout {
            target: target.to_owned(),
            labels,
            initial: rounded(&initial),
            composed: rounded(&composed),
        };
        write_whole(
            &path(&args.out, target, seed),
            &serde_json::to_vec(&layout)?,
        )?;
        bar.inc(1);
    }
    bar.finish();
    Ok(())
}

fn random(n: usize, seed: u64) -> Vec<Point> {
    let mut rng = ChaCha20Rng::seed_from_u64(seed);
    let mut unit = || f64::from(rng.next_u32()) / f64::from(u32::MAX);
    (0..n).map(|_| [unit(), unit()]).collect()
}

fn rows(features: &Tensor) -> Result<Vec<Vec<f64>>> {
    Ok(Vec::try_from(features.to_kind(Kind::Double))?)
}

/// Rounds to a thousandth, far less than a dot.
fn rounded(points: &[Point]) -> Vec<Point> {
    let rounded = |x: f64| (1e3 * x).round() / 1e3;
    points.iter().map(|point| point.map(rounded)).collect()
}

/// The report's text about the picture; empty without a picture.
pub fn section(layouts: &[Layout], num_tasks: usize, seed: u64) -> String {
    if layouts.is_empty() {
        return String::new();
    }
    format!(
        "\n### Features before and after\n\nThe picture is t-SNE of the features of up to {MOST} test images of each target ({} of \
         {num_tasks}, seed {seed}), a colour a class; on the left under the initial prompt, on the right under HGPrompt's of all \
         sources, not tuned on the target.\n",
        layouts.len()
    )
}

// ---- Drawing -----------------------------------------------------------------------------------

const PANEL: i32 = 170;
const GAP: i32 = 8;
const PAIR: i32 = 2 * PANEL + GAP;
const ROW: i32 = PANEL + 44;
const TOP: i32 = 60;
const LEFT: i32 = 16;

/// Draws two panels for each target, and two targets in each row.
pub fn picture(path: &Path, layouts: &[Layout]) -> Result<()> {
    if layouts.is_empty() {
        return Ok(());
    }
    let size = (
        (2 * (LEFT + PAIR) + 2 * LEFT) as u32,
        (TOP + layouts.len().div_ceil(2) as i32 * ROW) as u32,
    );
    draw(path, size, |area| {
        let title =
            "features of test images: left under the initial prompt, right under HGPrompt's";
        area.draw_text(title, &style(17, &INK, HPos::Left), (LEFT, 20))?;
        let percent = "percent: points whose nearest is of their class";
        area.draw_text(percent, &style(13, &GREY, HPos::Left), (LEFT, 42))?;
        for (at, layout) in layouts.iter().enumerate() {
            let x = LEFT + (at % 2) as i32 * (PAIR + 2 * LEFT);
            let y = TOP + (at / 2) as i32 * ROW;
            area.draw_text(&layout.target, &style(14, &INK, HPos::Left), (x, y + GAP))?;
            let y = y + 2 * GAP + 4;
            panel(area, (x, y), layout, &layout.initial)?;
            panel(area, (x + PANEL + GAP, y), layout, &layout.composed)?;
        }
        Ok(())
    })
}

fn panel(
    area: &Area<'_>,
    (left, top): (i32, i32),
    layout: &Layout,
    points: &[Point],
) -> Result<()> {
    let corners = [(left, top), (left + PANEL, top + PANEL)];
    area.draw(&Rectangle::new(corners, GRID))?;
    let share = format!("{:.0} %", 100.0 * among_their_own(points, &layout.labels));
    let above = (left + PANEL, top - 12);
    area.draw_text(&share, &style(13, &GREY, HPos::Right), above)?;
    let num_classes = layout.labels.iter().max().map_or(0, |most| most + 1);
    let pixel = |axis: usize| {
        let range = padded(points.iter().map(|point| point[axis]));
        move |x: f64| (f64::from(PANEL) * (x - range.start) / (range.end - range.start)) as i32
    };
    let (x, y) = (pixel(0), pixel(1));
    for (point, label) in points.iter().zip(&layout.labels) {
        let at = (left + x(point[0]), top + y(point[1]));
        area.draw(&Circle::new(at, 2, color_of(*label, num_classes).filled()))?;
    }
    Ok(())
}

/// Share of the points whose nearest point has their label.
fn among_their_own(points: &[Point], labels: &[usize]) -> f64 {
    let is_so = |i: &usize| {
        let distance = |j: &usize| squared_distance(&points[*i], &points[*j]);
        let others = (0..points.len()).filter(|j| j != i);
        let nearest = others.min_by(|a, b| distance(a).total_cmp(&distance(b)));
        nearest.is_some_and(|nearest| labels[nearest] == labels[*i])
    };
    (0..points.len()).filter(is_so).count() as f64 / points.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_point_is_among_its_own_where_its_nearest_has_its_label() {
        let points = [[0.0, 0.0], [0.0, 1.0], [9.0, 0.0], [9.0, 2.0], [9.0, 3.0]];
        assert_eq!(among_their_own(&points, &[0, 0, 1, 1, 1]), 1.0);
        // The third point's nearest is the fourth, of another class; the fourth's is the fifth,
        // also of another class.
        assert_eq!(among_their_own(&points, &[0, 0, 1, 0, 1]), 0.4);
    }
}

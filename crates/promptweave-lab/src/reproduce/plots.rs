//! The report's pictures.

use std::path::Path;

use anyhow::Result;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::HPos;

use promptweave::offline::write_whole;
use promptweave::plot::{GREY, GRID, INK, PALETTE, color, padded, style, style_caption, tick};

pub type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// A method's label, and its points: number of sources, mean and deviation.
pub type Line<'a> = (&'a str, Vec<(usize, f64, f64)>);

/// Draws on white, and writes the picture.
pub fn draw(path: &Path, size: (u32, u32), on: impl FnOnce(&Area<'_>) -> Result<()>) -> Result<()> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        area.fill(&WHITE)?;
        on(&area)?;
        area.present()?;
    }
    write_whole(path, svg.as_bytes())
}

/// Draws a bar for each method: its mean accuracy in percent, from 0.
pub fn accuracies(path: &Path, means: &[(&str, Option<f64>)]) -> Result<()> {
    const ROW: i32 = 26;
    const TOP: i32 = 44;
    const LEFT: i32 = 230;
    const FULL: f64 = 400.0;
    let most = means
        .iter()
        .filter_map(|(_, mean)| *mean)
        .fold(1.0, f64::max);
    let size = (700, (TOP + means.len() as i32 * ROW + 14) as u32);
    draw(path, size, |area| {
        area.draw_text(
            "mean test accuracy, %",
            &style(17, &INK, HPos::Left),
            (LEFT, 20),
        )?;
        for (row, (label, mean)) in means.iter().enumerate() {
            let y = TOP + row as i32 * ROW + ROW / 2;
            let share = mean.unwrap_or(0.0) / most;
            let end = LEFT + (share * FULL).max(1.0).round() as i32;
            let filled = if label.starts_with("HGPrompt") {
                color(0)
            } else {
                color(6)
            };
            area.draw(&Rectangle::new(
                [(LEFT, y - 8), (end, y + 8)],
                filled.filled(),
            ))?;
            area.draw_text(label, &style(14, &INK, HPos::Right), (LEFT - 10, y))?;
            area.draw_text(
                &mean.map_or("–".into(), |mean| format!("{mean:.1}")),
                &style(14, &INK, HPos::Left),
                (end + 8, y),
            )?;
        }
        Ok(())
    })
}

/// Draws α by target (row) and source (column).
pub fn weights(path: &Path, (names, weights): &(Vec<&str>, Vec<Vec<Option<f64>>>)) -> Result<()> {
    const CELL: i32 = 58;
    const LEFT: i32 = 130;
    const TOP: i32 = 90;
    let side = names.len() as i32 * CELL;
    draw(
        path,
        ((LEFT + side + 20) as u32, (TOP + side + 20) as u32),
        |area| {
            area.draw_text(
                "α of HGPrompt: target by source",
                &style(17, &INK, HPos::Left),
                (LEFT, 20),
            )?;
            for (row, (target, of_target)) in names.iter().zip(weights).enumerate() {
                let y = TOP + row as i32 * CELL;
                area.draw_text(
                    target,
                    &style(13, &INK, HPos::Right),
                    (LEFT - 8, y + CELL / 2),
                )?;
                // The columns' names are in two rows, since side by side they would touch.
                let above = if row % 2 == 0 { TOP - 34 } else { TOP - 14 };
                let x = LEFT + row as i32 * CELL + CELL / 2;
                area.draw_text(target, &style(12, &INK, HPos::Center), (x, above))?;
                for (column, weight) in of_target.iter().enumerate() {
                    let x = LEFT + column as i32 * CELL;
                    let corners = [(x, y), (x + CELL - 2, y + CELL - 2)];
                    let Some(weight) = weight else {
                        area.draw(&Rectangle::new(corners, GRID.filled()))?;
                        continue;
                    };
                    area.draw(&Rectangle::new(corners, color(0).mix(*weight).filled()))?;
                    area.draw(&Rectangle::new(corners, GRID))?;
                    let ink = if *weight > 0.6 { &WHITE } else { &INK };
                    let at = (x + CELL / 2 - 1, y + CELL / 2);
                    area.draw_text(&format!("{weight:.2}"), &style(13, ink, HPos::Center), at)?;
                }
            }
            Ok(())
        },
    )
}

/// Draws α against the worth of its source, with a colour for each target.
pub fn correlation(path: &Path, points: &[(&str, Vec<(f64, f64)>)]) -> Result<()> {
    draw(path, (760, 460), |area| {
        let (chart, legend) = area.split_horizontally(560);
        let accuracies = points
            .iter()
            .flat_map(|(_, of)| of.iter().map(|point| point.1));
        let series: Vec<_> = points
            .iter()
            .map(|(name, of)| (*name, of.clone()))
            .collect();
        let y = padded(accuracies.chain([0.0]));
        let axes = Axes {
            caption: "α of HGPrompt against zero-shot accuracy",
            x: "weight of the source",
            y: "accuracy of the source alone, less the target's mean, points",
            x_range: -0.03..1.03,
            y_range: y,
        };
        let mut drawn = axes.on(&chart)?;
        for (row, (_, points)) in series.iter().enumerate() {
            let color = color_of(row, series.len());
            let dots = points
                .iter()
                .map(|point| Circle::new(*point, 3, color.filled()));
            drawn.draw_series(dots)?;
        }
        names(&legend, series.iter().map(|(name, _)| *name))
    })
}

/// Draws mean accuracy against the number of sources, with a line for each method.
pub fn scalability(path: &Path, series: &[Line<'_>]) -> Result<()> {
    draw(path, (800, 460), |area| {
        let (chart, legend) = area.split_horizontally(560);
        let all = || series.iter().flat_map(|(_, points)| points);
        let axes = Axes {
            caption: "more sources",
            x: "number of sources",
            y: "mean test accuracy, %",
            x_range: padded(all().map(|point| point.0 as f64)),
            y_range: padded(all().flat_map(|(_, mean, error)| [mean - error, mean + error])),
        };
        let mut drawn = axes.on(&chart)?;
        for (row, (_, points)) in series.iter().enumerate() {
            let line = points.iter().map(|(x, mean, _)| (*x as f64, *mean));
            drawn.draw_series(LineSeries::new(line.clone(), color(row).stroke_width(2)))?;
            drawn.draw_series(line.map(|point| Circle::new(point, 3, color(row).filled())))?;
        }
        names(&legend, series.iter().map(|(name, _)| *name))
    })
}

struct Axes<'a> {
    caption: &'a str,
    x: &'a str,
    y: &'a str,
    x_range: std::ops::Range<f64>,
    y_range: std::ops::Range<f64>,
}

type Chart<'a, 'b> = ChartContext<
    'a,
    SVGBackend<'b>,
    Cartesian2d<plotters::coord::types::RangedCoordf64, plotters::coord::types::RangedCoordf64>,
>;

impl Axes<'_> {
    fn on<'a, 'b>(&self, area: &'a Area<'b>) -> Result<Chart<'a, 'b>> {
        let mut chart = ChartBuilder::on(area)
            .caption(self.caption, style_caption())
            .margin(12)
            .x_label_area_size(46)
            .y_label_area_size(64)
            .build_cartesian_2d(self.x_range.clone(), self.y_range.clone())?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(GRID)
            .axis_style(GREY)
            .label_style(style(12, &INK, HPos::Center))
            .x_label_formatter(&|x| tick(*x, &self.x_range))
            .y_label_formatter(&|y| tick(*y, &self.y_range))
            .x_desc(self.x)
            .y_desc(self.y)
            .draw()?;
        Ok(chart)
    }
}

/// A colour from the palette, or a hue if there are too many rows for it.
pub(super) fn color_of(row: usize, count: usize) -> RGBAColor {
    match count {
        count if count <= PALETTE.len() => color(row).to_rgba(),
        _ => HSLColor(row as f64 / count as f64, 0.75, 0.45).to_rgba(),
    }
}

/// Draws the legend of the colours.
fn names<'a>(area: &Area<'_>, names: impl ExactSizeIterator<Item = &'a str>) -> Result<()> {
    let count = names.len();
    for (row, name) in names.enumerate() {
        let y = 60 + 24 * row as i32;
        area.draw(&Circle::new((10, y), 5, color_of(row, count).filled()))?;
        area.draw_text(name, &style(13, &INK, HPos::Left), (24, y))?;
    }
    Ok(())
}

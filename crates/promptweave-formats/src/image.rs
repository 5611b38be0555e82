//! Decodes image bytes to square RGB pixels, as Pillow does.

use fast_image_resize as fir;
use image::{ImageReader, Limits, RgbImage};
use std::io::Cursor;

use promptweave_domain::backbone::{Filter, Preprocessing};

/// The largest edge accepted, in pixels. A small file can declare a huge picture.
const MAX_EDGE: u32 = 8192;
/// The most pixels accepted. A progressive JPEG is also kept as coefficients, up to 15 bytes for
/// each pixel in all.
const MAX_PIXELS: u64 = 32_000_000;
const MAX_ALLOC: u64 = 256 << 20;

#[derive(Debug, thiserror::Error)]
pub enum UnreadableImage {
    #[error("unreadable image")]
    Decoder(#[from] image::ImageError),
    #[error(
        "it is {width}×{height} pixels large; at most {MAX_EDGE} by {MAX_EDGE} and {} million are accepted",
        MAX_PIXELS / 1_000_000
    )]
    TooLarge { width: u32, height: u32 },
}

/// Decodes PNG, JPEG, BMP, GIF or WebP, recognised by content; alpha is dropped.
pub fn decode(bytes: &[u8]) -> Result<RgbImage, UnreadableImage> {
    let reader = || ImageReader::new(Cursor::new(bytes)).with_guessed_format();
    let header = reader().map_err(image::ImageError::IoError)?;
    // The size is checked before the limits below, whose errors do not tell it.
    let (width, height) = header.into_dimensions()?;
    if width.max(height) > MAX_EDGE || u64::from(width) * u64::from(height) > MAX_PIXELS {
        return Err(UnreadableImage::TooLarge { width, height });
    }
    let mut limits = Limits::default();
    limits.max_image_width = Some(MAX_EDGE);
    limits.max_image_height = Some(MAX_EDGE);
    limits.max_alloc = Some(MAX_ALLOC);
    let mut reader = reader().map_err(image::ImageError::IoError)?;
    reader.limits(limits);
    Ok(reader.decode()?.into_rgb8())
}

/// Resizes directly to `size` × `size` and returns RGB bytes, row by row.
///
/// It follows Pillow: a horizontal then a vertical pass, each rounded and clamped to u8; bicubic
/// with a = -0.5. With `antialias` the filter's support is scaled when shrinking.
pub fn resize(image: &RgbImage, preprocessing: &Preprocessing) -> Vec<u8> {
    let edge = preprocessing.size as u32;
    let filter = match preprocessing.filter {
        Filter::Bicubic => fir::FilterType::CatmullRom,
        Filter::Bilinear => fir::FilterType::Bilinear,
    };
    let algorithm = if preprocessing.antialias {
        fir::ResizeAlg::Convolution(filter)
    } else {
        fir::ResizeAlg::Interpolation(filter)
    };
    let options = fir::ResizeOptions::new().resize_alg(algorithm);
    // One call for each axis. In one call the crate takes the vertical pass first, and the rounding
    // between the passes then moves pixels at hard edges by several levels from Pillow's.
    let mut wide = fir::images::Image::new(edge, image.height(), fir::PixelType::U8x3);
    let mut resized = fir::images::Image::new(edge, edge, fir::PixelType::U8x3);
    let mut resizer = fir::Resizer::new();
    resizer
        .resize(image, &mut wide, &options)
        .expect("both are RGB with 8 bits");
    resizer
        .resize(&wide, &mut resized, &options)
        .expect("both are RGB with 8 bits");
    resized.into_vec()
}

//! Lists, one page at a time (AIP-158).

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::http::error::Problem;

const DEFAULT_SIZE: u32 = 50;
const MAX_SIZE: u32 = 200;

#[derive(Clone, Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct PageQuery {
    /// The most items in the answer; 50 by default.
    #[param(minimum = 1, maximum = 200)]
    page_size: Option<u32>,
    /// `next_page_token` of the previous page.
    page_token: Option<String>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Page<T> {
    pub items: Vec<T>,
    /// Token of the next page; absent on the last one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_page_token: Option<String>,
}

impl PageQuery {
    /// A page request, for lists whose query has more than these two parameters.
    pub fn new(page_size: Option<u32>, page_token: Option<String>) -> Self {
        Self {
            page_size,
            page_token,
        }
    }

    fn size(&self) -> Result<usize, Problem> {
        match self.page_size.unwrap_or(DEFAULT_SIZE) {
            size @ 1..=MAX_SIZE => Ok(size as usize),
            size => Err(Problem::field(
                "invalid_page_size",
                "/page_size",
                format!("is {size}; it must lie in 1..={MAX_SIZE}"),
            )),
        }
    }

    /// How many rows to select: one more than the page holds, which tells whether there is another page.
    pub fn limit(&self) -> Result<i64, Problem> {
        Ok(self.size()? as i64 + 1)
    }

    /// The key of the last item of the previous page.
    pub fn after<K: std::str::FromStr>(&self) -> Result<Option<K>, Problem> {
        let Some(token) = &self.page_token else {
            return Ok(None);
        };
        let key = URL_SAFE_NO_PAD
            .decode(token)
            .ok()
            .and_then(|bytes| String::from_utf8(bytes).ok())
            .and_then(|text| text.parse().ok());
        key.map(Some).ok_or_else(|| {
            Problem::field(
                "invalid_page_token",
                "/page_token",
                "is not a token of this list; pass `next_page_token` as it was given",
            )
        })
    }

    /// Makes the page from the selected rows; `key` gives what [`Self::after`] will read.
    pub fn page<T>(
        &self,
        mut rows: Vec<T>,
        key: impl Fn(&T) -> String,
    ) -> Result<Page<T>, Problem> {
        let size = self.size()?;
        let more = rows.len() > size;
        rows.truncate(size);
        let next_page_token = rows
            .last()
            .filter(|_| more)
            .map(|last| URL_SAFE_NO_PAD.encode(key(last)));
        Ok(Page {
            items: rows,
            next_page_token,
        })
    }
}

//! Which prompts go together, and with which backbone. The service asks here when a request comes, the worker before it
//! computes, and so do the commands without a service: all of them refuse the same prompts with the same codes.
//!
//! A prompt that does not say what it was made for is trusted to fit.

use std::fmt::Display;

use crate::digest::Digest;
use crate::words::JobErrorCode;

/// The codes of every [`Incompatible`].
pub const CODES: [JobErrorCode; 9] = [
    JobErrorCode::DeepPromptNotComposable,
    JobErrorCode::DeepPromptNotPredictable,
    JobErrorCode::NoHead,
    JobErrorCode::DeepStart,
    JobErrorCode::SameSource,
    JobErrorCode::WidthMismatch,
    JobErrorCode::LengthMismatch,
    JobErrorCode::BackboneMismatch,
    JobErrorCode::PreprocessingMismatch,
];

/// Why a prompt is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{detail}")]
pub struct Incompatible {
    pub code: JobErrorCode,
    pub detail: String,
}

/// The facts about a prompt that decide what it goes together with.
#[derive(Clone, Debug)]
pub struct PromptFacts<'a> {
    /// The prompt as messages name it, for example `dtd:2`.
    pub name: String,
    /// sha256 of the file.
    pub digest: Digest,
    /// m, the prompt's length.
    pub num_tokens: usize,
    /// d, the prompt's width.
    pub embed_dim: usize,
    /// Whether it has tokens at every block.
    pub deep: bool,
    pub backbone_digest: Option<Digest>,
    pub preprocessing_id: Option<&'a str>,
}

/// The facts about a backbone that decide which prompts fit it.
#[derive(Clone, Debug)]
pub struct BackboneFacts<'a> {
    /// The backbone's name; `None` without a registry.
    pub name: Option<&'a str>,
    pub digest: Digest,
    pub embed_dim: usize,
    pub preprocessing_id: String,
}

impl BackboneFacts<'_> {
    fn named(&self) -> String {
        match self.name {
            Some(name) => format!("backbone `{name}`"),
            None => "the backbone".to_owned(),
        }
    }
}

/// A prompt that is to blame, by its index.
pub type Blamed = (usize, Incompatible);

/// Checks that prompts can be summed number by number: every one is shallow and named once, and all have one shape, one
/// backbone and one preprocessing.
pub fn check_composable(prompts: &[PromptFacts]) -> Result<(), Blamed> {
    for (index, prompt) in prompts.iter().enumerate() {
        check_joins(prompt, &prompts[..index]).map_err(|refused| (index, refused))?;
    }
    common_backbone(prompts)?;
    common_preprocessing(prompts)?;
    Ok(())
}

/// Checks that a prompt is shallow, is not among the others, and has their shape.
pub fn check_joins(prompt: &PromptFacts, others: &[PromptFacts]) -> Result<(), Incompatible> {
    let name = &prompt.name;
    if prompt.deep {
        return refuse(
            JobErrorCode::DeepPromptNotComposable,
            format!("`{name}` is a deep prompt; only shallow prompts can be composed"),
        );
    }
    if let Some(same) = others.iter().find(|other| other.digest == prompt.digest) {
        return same_source(&same.name, name, &prompt.digest);
    }
    let Some(first) = others.first() else {
        return Ok(());
    };
    if prompt.embed_dim != first.embed_dim {
        return refuse(
            JobErrorCode::WidthMismatch,
            format!(
                "`{name}` is {} wide and `{}` is {}; prompts of one width can be composed",
                prompt.embed_dim, first.name, first.embed_dim
            ),
        );
    }
    if prompt.num_tokens != first.num_tokens {
        return refuse(
            JobErrorCode::LengthMismatch,
            format!(
                "`{name}` has {} tokens and `{}` has {}; prompts of one length can be composed",
                prompt.num_tokens, first.name, first.num_tokens
            ),
        );
    }
    Ok(())
}

/// The backbone that all prompts were made for which say so; `None` if none says so.
pub fn common_backbone(prompts: &[PromptFacts]) -> Result<Option<Digest>, Blamed> {
    common(
        prompts,
        JobErrorCode::BackboneMismatch,
        "for backbone",
        |it| it.backbone_digest,
    )
}

/// The preprocessing that all prompts were made with which say so; `None` if none says so.
pub fn common_preprocessing<'a>(prompts: &[PromptFacts<'a>]) -> Result<Option<&'a str>, Blamed> {
    let code = JobErrorCode::PreprocessingMismatch;
    common(prompts, code, "with preprocessing", |it| {
        it.preprocessing_id
    })
}

fn common<'a, T: PartialEq + Display>(
    prompts: &[PromptFacts<'a>],
    code: JobErrorCode,
    made: &str,
    fact: impl Fn(&PromptFacts<'a>) -> Option<T>,
) -> Result<Option<T>, Blamed> {
    let mut stated = (prompts.iter().enumerate()).filter_map(|(i, it)| Some((i, it, fact(it)?)));
    let Some((_, first, common)) = stated.next() else {
        return Ok(None);
    };
    if let Some((index, other, unlike)) = stated.find(|(.., fact)| *fact != common) {
        let detail = format!(
            "`{}` was made {made} {unlike}, and `{}` {made} {common}; such prompts cannot be composed",
            other.name, first.name
        );
        return Err((index, Incompatible { code, detail }));
    }
    Ok(Some(common))
}

/// Checks that a prompt fits a backbone: its width, and the weights and preprocessing that it was made for.
pub fn check_fits(prompt: &PromptFacts, backbone: &BackboneFacts) -> Result<(), Incompatible> {
    let (name, named) = (&prompt.name, backbone.named());
    if prompt.embed_dim != backbone.embed_dim {
        return refuse(
            JobErrorCode::WidthMismatch,
            format!(
                "`{name}` is {} wide, and {named} is {}",
                prompt.embed_dim, backbone.embed_dim
            ),
        );
    }
    if let Some(digest) = prompt
        .backbone_digest
        .filter(|digest| *digest != backbone.digest)
    {
        return refuse(
            JobErrorCode::BackboneMismatch,
            format!(
                "`{name}` was made for backbone {digest}, and {named} is {}",
                backbone.digest
            ),
        );
    }
    match prompt.preprocessing_id {
        Some(id) if id != backbone.preprocessing_id => refuse(
            JobErrorCode::PreprocessingMismatch,
            format!(
                "`{name}` was made with preprocessing `{id}`, and {named} has `{}`",
                backbone.preprocessing_id
            ),
        ),
        _ => Ok(()),
    }
}

/// Checks that a tuning can start from a prompt.
pub fn check_start(prompt: &PromptFacts) -> Result<(), Incompatible> {
    if prompt.deep {
        let detail = format!(
            "`{}` is a deep prompt; a tuning starts from a shallow one",
            prompt.name
        );
        return refuse(JobErrorCode::DeepStart, detail);
    }
    Ok(())
}

/// The refusal of a prompt that is there already.
pub fn same_source<T>(first: &str, second: &str, digest: &Digest) -> Result<T, Incompatible> {
    refuse(
        JobErrorCode::SameSource,
        format!("`{second}` has the same bytes as `{first}` ({digest}); name each prompt once"),
    )
}

fn refuse<T>(code: JobErrorCode, detail: String) -> Result<T, Incompatible> {
    Err(Incompatible { code, detail })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompt(name: &str) -> PromptFacts<'static> {
        PromptFacts {
            name: name.to_owned(),
            digest: Digest::of(name.as_bytes()),
            num_tokens: 5,
            embed_dim: 8,
            deep: false,
            backbone_digest: Some(Digest::of(b"backbone")),
            preprocessing_id: Some("98"),
        }
    }

    /// A name for a change of a prompt, and the change.
    type Change = (JobErrorCode, fn(&mut PromptFacts<'static>));

    const UNLIKE: [Change; 6] = [
        (JobErrorCode::DeepPromptNotComposable, |it| it.deep = true),
        (JobErrorCode::SameSource, |it| it.digest = Digest::of(b"a")),
        (JobErrorCode::WidthMismatch, |it| it.embed_dim = 9),
        (JobErrorCode::LengthMismatch, |it| it.num_tokens = 6),
        (JobErrorCode::BackboneMismatch, |it| {
            it.backbone_digest = Some(Digest::of(b"other"));
        }),
        (JobErrorCode::PreprocessingMismatch, |it| {
            it.preprocessing_id = Some("224");
        }),
    ];

    #[test]
    fn one_difference_is_refused_with_its_code_and_the_names_of_both() {
        let alike = ["a", "b", "c"].map(prompt);
        assert_eq!(check_composable(&alike), Ok(()));
        for (code, change) in UNLIKE {
            let mut prompts = alike.clone();
            change(&mut prompts[1]);
            let (index, refused) = check_composable(&prompts).unwrap_err();
            assert_eq!((index, refused.code), (1, code));
            assert!(CODES.contains(&code));
            assert!(refused.detail.contains("`b`"), "{refused}");
            let names_another = refused.detail.contains("`a`");
            assert_eq!(
                names_another,
                code != JobErrorCode::DeepPromptNotComposable,
                "{refused}"
            );
        }
    }

    #[test]
    fn a_prompt_that_says_nothing_is_trusted_and_does_not_hide_others() {
        let mut prompts = ["a", "b", "c"].map(prompt);
        prompts[0].backbone_digest = None;
        prompts[0].preprocessing_id = None;
        assert_eq!(check_composable(&prompts), Ok(()));
        prompts[2].preprocessing_id = Some("224");
        let (index, refused) = check_composable(&prompts).unwrap_err();
        assert_eq!(
            (index, refused.code),
            (2, JobErrorCode::PreprocessingMismatch)
        );
        assert!(refused.detail.contains("`b`"), "{refused}");
    }

    #[test]
    fn a_prompt_fits_the_backbone_that_it_was_made_for() {
        let backbone = BackboneFacts {
            name: Some("vit"),
            digest: Digest::of(b"backbone"),
            embed_dim: 8,
            preprocessing_id: "98".to_owned(),
        };
        assert_eq!(check_fits(&prompt("a"), &backbone), Ok(()));
        for (code, change) in UNLIKE {
            let mut other = prompt("b");
            change(&mut other);
            let of_backbone = [
                JobErrorCode::WidthMismatch,
                JobErrorCode::BackboneMismatch,
                JobErrorCode::PreprocessingMismatch,
            ];
            match check_fits(&other, &backbone) {
                Ok(()) => assert!(!of_backbone.contains(&code)),
                Err(refused) => {
                    assert_eq!(refused.code, code);
                    assert!(refused.detail.contains("backbone `vit`"), "{refused}");
                }
            }
        }
        let mut deep = prompt("a");
        deep.deep = true;
        assert_eq!(
            check_start(&deep).unwrap_err().code,
            JobErrorCode::DeepStart
        );
    }
}

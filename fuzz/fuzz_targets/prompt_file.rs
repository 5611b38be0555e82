//! An uploaded prompt file. An accepted file must be written and read back as the same prompt.
#![no_main]

use libfuzzer_sys::fuzz_target;
use promptweave_formats::peft;
use promptweave_domain::prompt_file::{MAX_EMBED_DIM, MAX_TOKENS, PromptFile};

fuzz_target!(|bytes: &[u8]| {
    let Ok(file) = PromptFile::parse(bytes) else {
        return;
    };
    assert!((1..=MAX_TOKENS).contains(&file.num_tokens()));
    assert!((1..=MAX_EMBED_DIM).contains(&file.embed_dim()));
    let values = &file.prompt_embeddings.values;
    assert_eq!(values.len(), file.num_tokens() * file.embed_dim());
    assert!(values.iter().all(|value| value.is_finite()));

    let written = file.to_bytes();
    let again = PromptFile::parse(&written).expect("it was written here");
    let widened = PromptFile {
        dtype: "f32",
        ..file
    };
    assert_eq!(again, widened);
    assert_eq!(again.to_bytes(), written, "same content, same bytes");

    if let Ok(adapter) = peft::export(bytes, &widened, None, None) {
        let exported = PromptFile::parse(&adapter.model).expect("it was written here");
        assert_eq!(exported.prompt_embeddings, widened.prompt_embeddings);
    }
});

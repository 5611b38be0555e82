//! An uploaded tar of a PEFT adapter: its archive, configuration and weights are read, then written out again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use promptweave_formats::peft;
use promptweave_formats::peft::{AdapterConfig, archive};
use promptweave_domain::prompt_file::PromptFile;

fuzz_target!(|bytes: &[u8]| {
    let Ok(found) = archive::find(bytes) else {
        return;
    };
    let (config, model) = (&bytes[found.config], &bytes[found.model]);
    let (Ok(config), Ok(prompt)) = (AdapterConfig::parse(config), PromptFile::parse(model)) else {
        return;
    };
    if config.check(&prompt).is_err() {
        return;
    }
    let record = config.clone().record();
    let Ok(adapter) = peft::export(model, &prompt, Some(&record), None) else {
        return;
    };
    let packed = archive::pack(&adapter);
    let again = archive::find(&packed).expect("it was packed here");
    AdapterConfig::parse(&packed[again.config])
        .and_then(|config| config.check(&prompt))
        .expect("it was exported here");
    let read = PromptFile::parse(&packed[again.model]).expect("it was exported here");
    assert_eq!(read.prompt_embeddings, prompt.prompt_embeddings);
});

//! The grammar of references, in full and as a part of a path. An accepted reference must be read back from its own
//! text.
#![no_main]

use libfuzzer_sys::fuzz_target;
use promptweave_domain::reference::{Reference, ResourceName, VersionSelector};

fuzz_target!(|text: &str| {
    if let Ok(reference) = text.parse::<Reference>() {
        assert_eq!(reference.to_string().parse(), Ok(reference.clone()));
        let name = reference.name.as_str();
        assert!((1..=128).contains(&name.len()) && !name.contains(['/', '\\', ':', '@', '\0']));
        assert!(name.as_bytes()[0].is_ascii_alphanumeric(), "no `..`");
    }
    if let Ok(name) = text.parse::<ResourceName>() {
        assert_eq!(name.as_str(), text);
    }
    if let Ok(VersionSelector::Number(number)) = text.parse() {
        assert!(number >= 1);
    }
});

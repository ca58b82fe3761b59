//! Reading configurations and revisions.

use std::collections::HashMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use sluice_proto::v1;

use super::client::CliError;
use crate::json;
use crate::resource::Key;

/// Reads configurations and puts them together.
pub(super) fn read_files(files: &[PathBuf]) -> Result<v1::Config, CliError> {
    let mut whole = v1::Config::default();
    for file in files {
        let name = file.display().to_string();
        let text = read_text(file).map_err(|source| CliError::File { path: name.clone(), source })?;
        let part = json::read_config(&text)
            .map_err(|source| CliError::Read { path: name, source: source.into() })?;
        whole.switches.extend(part.switches);
        whole.acl_groups.extend(part.acl_groups);
        whole.vnics.extend(part.vnics);
    }
    Ok(whole)
}

fn read_text(file: &Path) -> std::io::Result<String> {
    if file == Path::new("-") {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text)?;
        return Ok(text);
    }
    fs::read_to_string(file)
}

/// Reads `vnics/vm1=7` words.
pub(super) fn read_revisions(words: &[String]) -> Result<HashMap<String, u64>, CliError> {
    let usage = |word: &str| CliError::Usage(format!("`{word}` is not RESOURCE=N, such as vnics/vm1=7"));
    let pairs = words.iter().map(|word| {
        let (resource, revision) = word.split_once('=').ok_or_else(|| usage(word))?;
        let key: Key = resource.parse().map_err(|_| usage(word))?;
        Ok((key.to_string(), revision.parse().map_err(|_| usage(word))?))
    });
    pairs.collect()
}

/// Reads `vnics/vm1` words.
pub(super) fn read_references(words: &[String]) -> Result<Vec<v1::ResourceRef>, CliError> {
    let references = words.iter().map(|word| {
        let usage = |_| CliError::Usage(format!("`{word}` is not a resource, such as vnics/vm1"));
        let key: Key = word.parse().map_err(usage)?;
        Ok(v1::ResourceRef { kind: key.kind.singular().to_owned(), name: key.name })
    });
    references.collect()
}

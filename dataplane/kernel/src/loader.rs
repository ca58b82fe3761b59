//! From the embedded object and what is pinned to maps and programs that are ready to use.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use aya::EbpfLoader;
use aya::programs::{ProgramError, SchedClassifier, Xdp};
use sluice_pipeline::tables::{Globals, LAYOUT_VERSION};

use crate::maps::Maps;
use crate::pins::{self, Pins};
use crate::report::{MapsOutcome, ProgramsOutcome};
use crate::syscall::{self, MapShape};
use crate::{EngineError, kernel_types, object};

/// The program on TCX.
pub(crate) const TC: &str = "sluice_tc";
/// The program on XDP.
const XDP: &str = "sluice_xdp";

/// A loaded program.
#[derive(Debug)]
pub(crate) struct Program {
    name: &'static str,
    fd: OwnedFd,
    pub(crate) id: u32,
    /// Under its pin is another program, or none.
    stale_pin: bool,
}

impl Program {
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Makes the pin refer to this program, if it does not yet.
    fn pin(&mut self, directory: &Path) -> Result<(), EngineError> {
        if self.stale_pin {
            let path = directory.join(self.name);
            pins::unpin(&path)?;
            syscall::pin(self.fd(), &path).map_err(EngineError::io(format!("pinning {}", path.display())))?;
            self.stale_pin = false;
        }
        Ok(())
    }
}

/// Pins an object if nothing is under that name.
pub(crate) fn repin(object: BorrowedFd<'_>, path: &Path) -> Result<Option<String>, EngineError> {
    if path.exists() {
        return Ok(None);
    }
    let failed = || EngineError::io(format!("pinning {} again", path.display()));
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(failed())?;
    }
    syscall::pin(object, path).map_err(failed())?;
    Ok(Some(format!("the pin {} was gone; made again", path.display())))
}

/// What the loader made.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) maps: Maps,
    /// Every map of the object, also those that only programs use, for pinning again.
    all_maps: Vec<(String, OwnedFd)>,
    pub(crate) tc: Program,
    pub(crate) xdp: Program,
    pub(crate) maps_outcome: MapsOutcome,
    pub(crate) programs_outcome: ProgramsOutcome,
}

impl Loaded {
    /// Whether programs that use other maps than ours are still attached.
    pub(crate) fn is_replacement(&self) -> bool {
        matches!(self.maps_outcome, MapsOutcome::Replaced { .. })
    }

    /// Pins again what lost its pin. Says what.
    pub(crate) fn repair(&self, pins: &Pins) -> Result<Vec<String>, EngineError> {
        let mut done = Vec::new();
        let directory = if self.is_replacement() { pins.new_maps() } else { pins.maps() };
        for (name, map) in &self.all_maps {
            done.extend(repin(map.as_fd(), &directory.join(name))?);
        }
        for program in [&self.tc, &self.xdp] {
            // One that was never pinned is pinned when it has replaced its predecessor everywhere.
            if !program.stale_pin {
                done.extend(repin(program.fd(), &pins.programs().join(program.name))?);
            }
        }
        Ok(done)
    }

    /// Called when no link runs another program any more: pins what is in use now.
    pub(crate) fn settle(&mut self, pins: &Pins) -> Result<(), EngineError> {
        if self.is_replacement() {
            pins.promote_new_maps()?;
            self.maps_outcome = MapsOutcome::Adopted;
        }
        self.tc.pin(&pins.programs())?;
        self.xdp.pin(&pins.programs())
    }
}

/// Loads the object with the pinned maps if they fit, else with new ones.
pub(crate) fn load(pins: &Pins) -> Result<Loaded, EngineError> {
    let object = object::embedded()?;
    let expected = expected_maps(object)?;
    pins.settle_maps()?;
    let misfit = misfit(&pins.maps(), &expected)?;
    let (directory, maps_outcome) = match misfit {
        Misfit::Empty => (pins.maps(), MapsOutcome::Created),
        Misfit::None => (pins.maps(), MapsOutcome::Adopted),
        Misfit::Because(reason) => (pins.new_maps(), MapsOutcome::Replaced { reason }),
    };
    fs::create_dir_all(&directory).map_err(EngineError::io(format!("making {}", directory.display())))?;

    let mut loader = EbpfLoader::new();
    for name in expected.keys() {
        loader.map_pin_path(name, directory.join(name));
    }
    let filled = kernel_types::fill_in(object)?;
    let mut ebpf =
        loader.load(bytemuck::cast_slice(&filled)).map_err(|error| EngineError::Load(Box::new(error)))?;
    let missing = |name: &str| EngineError::ObjectMismatch(format!("there is no program {name} in it"));
    let refused = |name| move |error: ProgramError| EngineError::Program { name, source: Box::new(error) };
    let mut outcomes = Vec::new();
    let mut adopt = |name, fd: BorrowedFd<'_>| -> Result<Program, EngineError> {
        let (program, outcome) = choose(name, fd, &pins.programs())?;
        outcomes.push(outcome);
        Ok(program)
    };

    let program: &mut SchedClassifier =
        ebpf.program_mut(TC).ok_or_else(|| missing(TC))?.try_into().map_err(refused(TC))?;
    program.load().map_err(refused(TC))?;
    let tc = adopt(TC, program.fd().map_err(refused(TC))?.as_fd())?;
    let program: &mut Xdp =
        ebpf.program_mut(XDP).ok_or_else(|| missing(XDP))?.try_into().map_err(refused(XDP))?;
    program.load().map_err(refused(XDP))?;
    let xdp = adopt(XDP, program.fd().map_err(refused(XDP))?.as_fd())?;

    let maps = Maps::open(&directory)?;
    let all_maps = expected
        .into_keys()
        .map(|name| {
            let fd = syscall::open_pin(&directory.join(&name))
                .map_err(EngineError::io(format!("opening the pin of map {name}")))?;
            Ok((name, fd))
        })
        .collect::<Result<_, EngineError>>()?;
    let globals = maps.globals.get(&0)?;
    if globals.is_none_or(|globals| globals.layout != LAYOUT_VERSION) {
        maps.globals.set(&0, &Globals { epoch: 1, layout: LAYOUT_VERSION, reserved: 0 })?;
    }
    let programs_outcome = if outcomes.contains(&ProgramsOutcome::Replaced) {
        ProgramsOutcome::Replaced
    } else if outcomes.contains(&ProgramsOutcome::Loaded) {
        ProgramsOutcome::Loaded
    } else {
        ProgramsOutcome::Adopted
    };
    Ok(Loaded { maps, all_maps, tc, xdp, maps_outcome, programs_outcome })
}

/// The pinned program if it is the same as the one just loaded, else that.
fn choose(
    name: &'static str,
    loaded: BorrowedFd<'_>,
    directory: &Path,
) -> Result<(Program, ProgramsOutcome), EngineError> {
    let failed = || EngineError::io(format!("reading information about the program {name}"));
    let (id, identity) = syscall::program_info(loaded).map_err(failed())?;
    let outcome = match syscall::open_pin(&directory.join(name)) {
        Ok(pinned) => {
            let (id, pinned_identity) = syscall::program_info(pinned.as_fd()).map_err(failed())?;
            if pinned_identity == identity {
                let program = Program { name, fd: pinned, id, stale_pin: false };
                return Ok((program, ProgramsOutcome::Adopted));
            }
            ProgramsOutcome::Replaced
        }
        Err(_) => ProgramsOutcome::Loaded,
    };
    let fd = loaded.try_clone_to_owned().map_err(failed())?;
    Ok((Program { name, fd, id, stale_pin: true }, outcome))
}

/// The maps of the object, by name.
fn expected_maps(object: &[u8]) -> Result<BTreeMap<String, MapShape>, EngineError> {
    let object =
        aya_obj::Object::parse(object).map_err(|error| EngineError::ObjectMismatch(error.to_string()))?;
    Ok(object
        .maps
        .iter()
        // Sections such as .rodata cannot be pinned under their names; programs that have them are never the same.
        .filter(|(name, _)| !name.starts_with('.'))
        .map(|(name, map)| {
            let shape = MapShape {
                kind: map.map_type(),
                key_size: map.key_size(),
                value_size: map.value_size(),
                max_entries: map.max_entries(),
                flags: map.map_flags(),
            };
            (name.clone(), shape)
        })
        .collect())
}

/// Whether the pinned maps can be used.
enum Misfit {
    None,
    Empty,
    Because(String),
}

/// The kernel sets some flags and sizes of device maps itself.
fn comparable(shape: &MapShape) -> (u32, u32, Option<u32>, u32, Option<u32>) {
    use aya_obj::generated::bpf_map_type::{BPF_MAP_TYPE_DEVMAP, BPF_MAP_TYPE_DEVMAP_HASH};
    let device = [BPF_MAP_TYPE_DEVMAP as u32, BPF_MAP_TYPE_DEVMAP_HASH as u32].contains(&shape.kind);
    let unless_device = |value| (!device).then_some(value);
    (
        shape.kind,
        shape.key_size,
        unless_device(shape.value_size),
        shape.max_entries,
        unless_device(shape.flags),
    )
}

fn misfit(directory: &Path, expected: &BTreeMap<String, MapShape>) -> Result<Misfit, EngineError> {
    let none_pinned = match fs::read_dir(directory) {
        Ok(mut entries) => entries.next().is_none(),
        Err(_) => true,
    };
    if none_pinned {
        return Ok(Misfit::Empty);
    }
    for (name, expected) in expected {
        let Ok(fd) = syscall::open_pin(&directory.join(name)) else {
            return Ok(Misfit::Because(format!("map {name} is not pinned")));
        };
        let (_, shape) = syscall::map_info(fd.as_fd())
            .map_err(EngineError::io(format!("reading information about map {name}")))?;
        if comparable(&shape) != comparable(expected) {
            return Ok(Misfit::Because(format!("map {name} is {shape:?}, this build needs {expected:?}")));
        }
    }
    // All sizes fit, so this cannot fail but for the contents.
    let globals = Maps::open(directory)?.globals.get(&0)?;
    match globals.map(|globals| globals.layout) {
        Some(LAYOUT_VERSION) => Ok(Misfit::None),
        // Nobody has written to them yet: a process was killed while making them.
        Some(0) => Ok(Misfit::None),
        layout => Ok(Misfit::Because(format!(
            "the maps have layout {}, this build has {LAYOUT_VERSION}",
            layout.unwrap_or_default()
        ))),
    }
}

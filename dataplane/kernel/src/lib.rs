//! sluice-kernel

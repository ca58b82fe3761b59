//! vhost-user: guest rings served directly, guest memory shared with the VMM.

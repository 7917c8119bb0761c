"""The same network behind other servers, as their users would write it: what Fovea is compared with (docs/overload.md)."""

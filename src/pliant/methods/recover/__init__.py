"""Methods that recover tensors: missing entries, gross errors."""

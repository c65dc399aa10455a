"""What methods that recover and cluster share: solvers, tensor models, subspaces."""

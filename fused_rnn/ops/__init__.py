"""One layer as an operation: called plainly, recorded by autograd, transformed, or traced."""

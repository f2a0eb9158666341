"""The ops: checks of user arguments, one `torch.library` registration for all backends, autograd and result shapes."""

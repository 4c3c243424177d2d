"""The little of Megatron-LM's ``megatron.training`` that the stand-in script and the launcher use.

For tests with a megatron-core wheel that has no ``megatron.training``. Written for them; the names
and the meaning of arguments are Megatron's.
"""

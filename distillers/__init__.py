"""The zoo: each module of this folder holds one distillation method, named after its file."""

"""Several processes that train one run: who they are (world.py), and the weights they share (sharding.py).

Every process runs the whole program. What has the shape [P, G], [B] or [B, T] is global and the same in all
of them; what has an H, a K or a weight in it is a process's own. One process alone imports no
torch.distributed.
"""

"""Mixers: what a layer reads of the positions before it. One file each, one interface (base.py), and stack.py, which runs them.

| mixer                  | keeps of the past                                  | file                     |
|------------------------|----------------------------------------------------|--------------------------|
| `gated_deltanet`       | a matrix per head, corrected by every key          | gated_deltanet.py        |
| `mamba3`               | a matrix per head, decayed and rotated             | mamba3.py                |
| `rodimus`              | one matrix, decayed by channel                     | rodimus.py               |
| `atlas`                | the weights of a small network, learned by segment | atlas.py                 |
| `gated_attention`      | keys and values, all or those of a window          | gated_attention.py       |
| `shared_key_attention` | one key and many values of a window                | shared_key_attention.py  |
"""

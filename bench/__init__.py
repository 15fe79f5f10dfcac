"""Microbenchmarks, one file bench_F.py per op family; installed as `fishleg_ext.bench`, run by `fishleg-ext bench`."""

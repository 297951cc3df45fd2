"""Room: what training a model computes, holds in memory, takes and costs. Knows no loss and no serving."""

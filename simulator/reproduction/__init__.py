"""Published numbers beside ours: what was printed is data, what we say is computed by the code it vouches for."""

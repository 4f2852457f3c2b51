"""Several processes: joining them, exchanging values, sharding minibatches, launching, averaging gradients."""

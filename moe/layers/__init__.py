"""The layers: attention through a context, feed-forward, mixture of experts, one decoder block."""

"""SamplingExplorer: where deformable attention reads."""

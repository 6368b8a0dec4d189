from exporter.merge.merge import merge

"""plugins.cluster"""

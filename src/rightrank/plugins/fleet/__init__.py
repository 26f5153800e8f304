"""plugins.fleet"""

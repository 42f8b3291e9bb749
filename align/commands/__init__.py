"""The work of each verb: read its inputs, write one folder."""

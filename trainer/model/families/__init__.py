"""The forwards of each family, where they are not what all share. What the launcher needs: `launch.inputs.families`."""
